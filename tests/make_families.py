"""Write dora_convert/naming/families.json: the names that an installed transformers gives to stored tensors.

    python -m tests.make_families            write the table
    python -m tests.make_families --check    compare the table with the installed transformers

Every model class is built on the meta device from its default config. The table then holds, for each class:
its base model's prefix, its first names, the models inside the class, and the config that each of them has. The rules
for names are transformers' own, from `conversion_mapping`. Nothing of transformers is needed to read the table.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel, ResNetConfig
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    ErnieFuseAndSplitTextVisionExperts,
    GroupWeightRename,
    Inkling2IndexOffsetWeightRename,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.utils import import_utils

from dora_convert.formats.peft.parameters import REGISTERED
from dora_convert.naming import families

FILE = Path(__file__).parent.parent / "dora_convert" / "naming" / "families.json"
Rule = list[Any]
USUAL = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM")
"""The lists of transformers in which a model type's usual class is looked for, best first."""
NO_SINGLE_HEAD = {"fsmt", "musicgen", "musicgen_melody", *families.COMPOSITE}
"""Model types with several heads, or with another model's head."""
ATTENTIONS = ("full_attention", "sliding_attention")
_BACKBONE = ResNetConfig(out_features=["stage4"])
_STAGES = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
_TOWER = ResNetConfig(vocab_size=128, vocab_offset=262144, rms_norm_eps=1e-6, hidden_size=2048, model_args=None)
_EYE = ResNetConfig(architecture="resnet", model_args={"embed_dim": 64}, hidden_size=64, num_labels=8)
"""Stand-ins for models of timm, which is not here: no rule is for a ResNet."""
import_utils.BACKENDS_MAPPING["scipy"] = (lambda: True, "")  # losses need scipy, models do not
HINTS: Mapping[str, Mapping[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "siglip_vision_model": {"num_attention_heads": 16},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 31},
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
    "granite4_vision": {"deepstack_layer_map": [(-2, 0), (-1, 1)], "downsample_rate": "4/8"},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 64,
        "indexer_budget": 1024,
        "indexer_compress_ratio": 16,
    },
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ATTENTIONS}
    },
    "nemotron": {"num_key_value_heads": 48},
    "autoformer": {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2]},
    "informer": {"prediction_length": 8, "context_length": 16},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "reformer": {"is_decoder": True},
    "": {"spatial_merge_size": 2},  # the talker of qwen3_omni_moe
    "detr": {"backbone_config": _STAGES},
    "conditional_detr": {"backbone_config": _BACKBONE},
    "deformable_detr": {"backbone_config": _STAGES},
    "dab-detr": {"backbone_config": _BACKBONE},
    "table-transformer": {"backbone_config": _BACKBONE},
    "gemma3n": {"vision_config": _TOWER},
    "fast_vlm": {"vision_config": _TOWER},
    "perception_lm": {"vision_config": _EYE},
    "pe_video_encoder": {"vision_config": _EYE},
    "edgetam_vision_model": {"backbone_config": _STAGES},
    "omdet-turbo": {"backbone_config": _STAGES, "timm_kwargs": {}},
}
"""Fields of configs whose defaults make no model, by model type."""


def classes() -> dict[str, str]:
    """Return transformers' model classes that its lists name, with their model types."""
    found: dict[str, str] = {}
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"):
            for model_type, entry in mapping.items():
                for one in entry if isinstance(entry, tuple | list) else (entry,):
                    found.setdefault(one, model_type)
    return found


def build(name: str, config: PretrainedConfig | None = None) -> PreTrainedModel | str:
    """Return a model of a class on the meta device; the reason if its default config makes none."""
    try:
        cls = getattr(transformers, name)
        config = config or hinted(cls.config_class())
        with torch.device("meta"), no_init_weights():
            return cls(config)
    except Exception as error:  # noqa: BLE001 # any of 400 families' own
        return f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"


def hinted(config: PretrainedConfig) -> PretrainedConfig:
    """Return a config whose defaults make a model."""
    for key, value in HINTS.get(config.model_type, {}).items():
        if isinstance(value, PretrainedConfig):
            vars(config)[key] = value  # past the check of the config's type
        else:
            setattr(config, key, value)
    for inner in list(vars(config).values()):
        if isinstance(inner, PretrainedConfig):
            hinted(inner)
    return config


def models_inside(model: PreTrainedModel) -> Iterator[tuple[str, str, PreTrainedModel]]:
    """Yield each model that lies directly in another one: its parent's path, its own path, and the model."""
    parents = {"": model}
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel):
            parent = max((each for each in parents if path.startswith(f"{each}.") or not each), key=len)
            yield parent, path, module
            parents[path] = module


def key_of(config: PretrainedConfig, inner: PretrainedConfig) -> str:
    """Return the key of a config inside another one; "" if a part shares its model's config."""
    if inner is config or inner.model_type == config.model_type:
        return ""
    values = {key: value for key, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    same = [key for key, value in values.items() if value is inner]
    alike = [key for key, value in values.items() if value.model_type == inner.model_type]
    return next(iter(same + alike), "")


class Facts:
    """Collects what classes say of themselves."""

    def __init__(self) -> None:
        self.models: dict[str, list[Any]] = {}
        """By class: the base model's prefix, the first names of its tensors, and its parts."""
        self.heads: dict[str, str] = {}
        """By class: the module of the output head, if it is not lm_head."""
        self.turned: set[str] = set()
        """Model types whose experts are stored as (in, out)."""
        self.fixed: dict[str, list[str]] = {}
        """By class: names in the model, with `*` for numbers, that the loader keeps although a rule changes them."""
        self.failed: dict[str, str] = {}

    def add(self, name: str, model: PreTrainedModel) -> None:
        """Enter a class, and the classes inside it that no list names."""
        parts: dict[str, list[list[str]]] = defaultdict(list)
        inside = list(models_inside(model))
        owners = {"": model, **{path: module for _, path, module in inside}}
        for parent, path, module in inside:
            own = path.removeprefix(parent).removeprefix(".")
            key = key_of(owners[parent].config, module.config)
            parts[parent].append([own, type(module).__name__, key, module.config.model_type])
        for path, module in owners.items():
            if path == "" or type(module).__name__ not in self.models:
                self.models[name if path == "" else type(module).__name__] = [
                    module.base_model_prefix,
                    sorted({key.partition(".")[0] for key in module.state_dict()}),
                    parts[path],
                ]
        self._add_modules(name, model)
        if fixed := sorted(set(_fixed(model))):
            self.fixed[name] = fixed

    def _add_modules(self, name: str, model: PreTrainedModel) -> None:
        """Enter the head and the experts of a model."""
        kinds = {type(module).__name__: module for _, module in model.named_modules()}
        for kind, module in kinds.items():
            own = [key for key, value in module.named_parameters(recurse=False) if value.ndim > 1 or "bias" in key]
            if "Expert" not in kind or not any(value.ndim == 3 for value in module.parameters(recurse=False)):
                continue
            known = [key for key in own if key in REGISTERED]
            if known != sorted(known, key=REGISTERED.index):
                raise ValueError(f"{kind} registers {own}: formats/peft/parameters.py has another order")
            if getattr(module, "is_transposed", False):
                self.turned.add(model.config.model_type)
        head = model.get_output_embeddings()
        path = next((path for path, module in model.named_modules() if module is head), "")
        if head is not None and path not in {"", "lm_head"}:
            self.heads[name] = path


def _fixed(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names that the loader keeps because a model has them, although rules would change them."""
    transforms = get_model_conversion_mapping(model)
    renames = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    names = model.state_dict()
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), name)
    for kind, name in kinds.items():
        if rename_source_key(name, renames, converters, model.base_model_prefix, names)[0] not in names:
            yield kind


def rules() -> dict[str, list[Rule] | str]:
    """Return transformers' rules by class or model type; a list that occurs twice is the first one's name."""
    seen: dict[str, str] = {}
    table: dict[str, list[Rule] | str] = {}
    for name, transforms in _build_checkpoint_conversion_mapping().items():
        written = [written_rule(transform) for transform in transforms]
        first = seen.setdefault(json.dumps(written), name)
        table[name] = written if first == name else first
    return table


def written_rule(transform: WeightTransform) -> Rule:
    """Return a rule as JSON: sources (expressions, in the order of trial), targets, and operations if any."""
    sources = [[index, source] for index, source in _branches(transform)]
    written: Rule = [sources if len(sources) > 1 else sources[0][1], list(transform.target_patterns)]
    if len(written[1]) == 1:
        written[1] = written[1][0]
    if isinstance(transform, GroupWeightRename):
        return [*written, ["group"]]
    if isinstance(transform, Inkling2IndexOffsetWeightRename):
        return [*written, [f"offset {transform.offset}"]]
    if isinstance(transform, WeightConverter):
        return [*written, [operation(each) for each in transform.operations]]
    return written


def _branches(transform: WeightTransform) -> list[tuple[int, str]]:
    """Return a rule's expressions with their positions, as transformers compiled them."""
    pattern = transform.compiled_sources.pattern
    starts = [*re.finditer(r"(?:^|\|)\(\?P<g(\d+)>", pattern)]
    ends = [*(start.start() for start in starts[1:]), len(pattern)]
    return [(int(start[1]), pattern[start.end() : end - 1]) for start, end in zip(starts, ends, strict=True)]


def operation(op: ConversionOps) -> str:
    """Return an operation as a word; its class's name if the table's reader does not know it."""
    match op:
        case MergeModulelist(dim=0):
            return "stack"
        case Concatenate(dim=dim, num_shards_attribute=None):
            return f"concatenate {dim}"
        case Chunk(dim=dim, num_shards_attribute=None):
            return f"chunk {dim}"
        case Split(dim=dim):
            return f"split {dim}"
        case Transpose(dim0=first, dim1=second, check_dims=check):
            return f"transpose {first} {second}{' if needed' * check}"
        case ErnieFuseAndSplitTextVisionExperts():
            return "share experts"
        case Interleave(dim=dim, inverse=False):
            return f"interleave {dim}"
        case PermuteForRope(subconfig_key=key, permute_layer_names=names, inverse=False):
            return f"rope {key or '-'} {','.join(names or ()) or '-'}"
    return type(op).__name__


def kept(models: Mapping[str, list[Any]], types: Mapping[str, str], table: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the classes that rules are for, in any of their parts, or whose parts a config chooses."""

    def counts(name: str) -> bool:
        if name in table or types.get(name) in table:
            return True
        parts = models[name][2] if name in models else []
        return any(key or kind in table or counts(inner) for _, inner, key, kind in parts)

    return {name: entry for name, entry in sorted(models.items()) if counts(name)}


def usual(models: Collection[str]) -> dict[str, str]:
    """Return the usual class with a head of each model type."""
    chosen: dict[str, str] = {}
    for name in USUAL:
        for model_type, entry in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").items():
            if entry in models:
                chosen.setdefault(model_type, entry)
    return chosen


def bare(models: Collection[str]) -> dict[str, str]:
    """Return the class without a head of each model type, as AutoModel chooses the class."""
    entries = modeling_auto.MODEL_MAPPING_NAMES.items()
    return {kind: name for kind, name in entries if isinstance(name, str) and name in models}


def make(only: Collection[str] = ()) -> tuple[dict[str, Any], Facts]:
    """Return the table of some model types or of all, and what models say of themselves."""
    facts, types = Facts(), classes()
    for name, model_type in types.items():
        if only and model_type not in only:
            continue
        model = build(name)
        if isinstance(model, str):
            facts.failed[name] = model
        else:
            facts.add(name, model)
    table = rules()
    models = kept(facts.models, types, table)
    written = {
        "transformers": transformers.__version__,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "rules": table,
        "models": models,
        "bare": bare(models),
        "usual": usual(models),
        "fixed": {name: kinds for name, kinds in sorted(facts.fixed.items()) if name in models},
    }
    return written, facts


def contradictions(facts: Facts) -> Iterator[str]:
    """Yield every fact about a model that `naming/families.py` has otherwise."""
    if facts.turned - families.TURNED_EXPERTS:
        yield f"TURNED_EXPERTS lacks {facts.turned - families.TURNED_EXPERTS}"
    types = classes()
    known = {kind: head for head, kinds in families.HEADS_OF.items() for kind in kinds}
    for name, head in facts.heads.items():
        if types.get(name) not in NO_SINGLE_HEAD and known.get(types.get(name, "")) != head:
            yield f"HEADS_OF lacks {head} of {types.get(name)}"


def as_text(table: Mapping[str, Any]) -> str:
    """Return a table as JSON, one entry a line."""
    parts = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in value.items())
            parts.append(f" {json.dumps(key)}: {{\n{rows}\n }}")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    """Write the table, or compare the written one with the installed transformers."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    table, facts = make()
    wrong = list(contradictions(facts))
    notes = [f"not built: {name}: {why}" for name, why in facts.failed.items()]
    sys.stderr.write("".join(f"{line}\n" for line in notes + wrong))
    if "--check" in sys.argv:
        written = json.loads(FILE.read_text())
        return int(
            bool(wrong) or any(written[key] != json.loads(json.dumps(table[key])) for key in table if key != "date")
        )
    FILE.write_text(as_text(table))
    sizes = f"{len(table['models'])} classes, {len(table['rules'])} lists of rules, {FILE.stat().st_size} bytes"
    sys.stdout.write(f"{FILE.name}: {sizes}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
