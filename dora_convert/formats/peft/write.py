"""PEFT's adapter folders, written: the same files and names that `peft.py` reads.

An adapter made of another one keeps what its config says and the names that its tensors have; what is new is named by
the weight that it is for. Where ranks are not those of the config it comes from, `r` is the largest, `lora_alpha` makes
the scaling 1 (a server that reads no patterns is right all the same), and every other module has a key of its own in
`rank_pattern` and `alpha_pattern`: its name, escaped, from ^ to $.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...adapters.adapter import Adapter, Change
from ...adapters.new_adapter import Files, NewAdapter
from ...adapters.updates import Decomposed, Delta, Full, LowRank, Rows, Start, low_rank
from ...storage.json_files import read_json
from ...storage.safetensors import StoredTensor
from .config import Config
from .names import CONFIG, PREFIX, TOKENS, WEIGHTS, plain

LINEAR = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
EMBEDDING = {"A": ".lora_embedding_A", "B": ".lora_embedding_B"}
MAGNITUDE = ".lora_magnitude_vector"
_FRESH: Mapping[str, Any] = {
    "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "revision": None, "inference_mode": True,
    "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": [], "modules_to_save": None, "bias": "none",
    "use_dora": False, "use_rslora": False, "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {},
    "fan_in_fan_out": False,
}  # fmt: skip
_OF_ADALORA = (
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
)  # fmt: skip
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip
"""PEFT's name of a task by how the name of a class ends. A class that it has none for is wrapped as it is."""
_CLASSIFIERS = ("classifier", "score")
_HEADS = {"SEQ_CLS": _CLASSIFIERS, "TOKEN_CLS": _CLASSIFIERS, "QUESTION_ANS": ("qa_outputs",)}
"""The modules that PEFT takes for saved whole because of the task, by the ends of their names."""


def save(made: NewAdapter) -> Files:
    """The files of an adapter folder."""
    tensors = {name: stored for change in made.changes for name, stored in _named(change, made)}
    config = json.dumps(_config(made), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    keep = frozenset(name for name in tensors if name.endswith((MAGNITUDE, f"{MAGNITUDE}.weight")))
    return Files(WEIGHTS[0], dict(sorted(tensors.items())), {CONFIG: config.encode()}, keep=keep)


def shares_rank(change: Change, tensor: str, like: Adapter) -> str | None:
    """Why a weight's factors must stay as they are: PEFT has one rank for several weights; None where it has not."""
    low, (_, config) = low_rank(change.update), _of(like)  # type: ignore[arg-type] # has factors
    if tensor.endswith("in_proj_weight") or ".base_layer." in low.A.name:
        return "a part of MultiheadAttention"
    if low.experts or (config and _is_parameter(change.target, config)):
        return "a parameter that is no layer's weight (target_parameters)"
    return None


def objection(change: Change, tensor: str, like: Adapter) -> str | None:
    """Why PEFT cannot load a LoRA as a DoRA, given its change and the base's name of the weight; None where it can."""
    low, (raw, config) = low_rank(change.update), _of(like)  # type: ignore[arg-type] # has factors
    if config and config.adalora:
        return "AdaLoRA has no DoRA: to-lora makes a LoRA of it first"
    if why := shares_rank(change, tensor, like):
        return why
    if low.blocks != (1, 1):
        return "block-diagonal (use_bdlora): to-lora makes a LoRA of it first"
    if low.start is Start.KASA:
        return "KaSA has no DoRA: to-lora makes a LoRA of it first"
    if raw.get("lora_bias"):
        return "has a bias on lora_B (lora_bias)"
    return "DoRA does not go with megatron_config" if raw.get("megatron_config") else None


def _named(change: Change, made: NewAdapter) -> Iterator[tuple[str, StoredTensor]]:
    """Each tensor of a change under its name in the file."""
    module = PREFIX + change.target.rpartition(".")[0]
    update = change.update

    def name(stored: StoredTensor, suffix: str) -> tuple[str, StoredTensor]:
        own = made.like is not None and made.like.tensors.get(stored.name) is stored
        return (PREFIX + plain(stored.name) if own else module + suffix, stored)

    match update:
        case LowRank() | Decomposed():
            low = low_rank(update)
            suffixes = EMBEDDING if low.transposed else LINEAR
            yield name(low.A, suffixes["A"])
            yield name(low.B, suffixes["B"])
            if low.d:
                yield name(low.d, ".lora_diag")
            if isinstance(update, Decomposed):
                yield name(update.m, MAGNITUDE)
        case Delta(value):
            yield name(value, ".lora_B.bias")
        case Rows(value):
            yield name(value, TOKENS[0])
        case Full(value):
            leaf = change.target.rpartition(".")[2]
            wrapped = leaf == "bias" and any(
                other.target == f"{module.removeprefix(PREFIX)}.weight" for other, _ in made.low_ranks
            )
            yield name(value, f"{'.base_layer' if wrapped else ''}.{leaf}")


def _of(like: Adapter | None) -> tuple[dict[str, Any], Config | None]:
    """The config of an adapter in this format: as it stands, and parsed."""
    if like is None or like.format != "peft":
        return {}, None
    path = like.source.path / CONFIG
    raw = read_json(path)
    return raw, Config.parse(raw, path)


def _config(made: NewAdapter) -> dict[str, Any]:
    """adapter_config.json."""
    before, config = _of(made.like)
    raw = {**_FRESH, **{key: value for key, value in before.items() if key not in _OF_ADALORA}}
    raw |= {"peft_type": "LORA", "inference_mode": True}
    raw |= {"base_model_name_or_path": made.base or raw["base_model_name_or_path"]}
    raw |= {"revision": made.revision or raw["revision"]} if not made.base else {"revision": made.revision}
    raw["use_dora"] = any(isinstance(change.update, Decomposed) for change in made.changes)
    raw |= _numbers(made, config) | _beginnings(made, before) | _targets(made, config) | _whole(made, config)
    if any(isinstance(change.update, Delta) for change in made.changes) != bool(raw.get("lora_bias")):
        raw["lora_bias"] = not raw.get("lora_bias")
    if not any(isinstance(change.update, Rows) for change in made.changes) and before:
        raw["trainable_token_indices"] = None
    if made.keeps_ties:
        raw["ensure_weight_tying"] = True
    if made.task and not before:
        raw |= _task(made, raw["modules_to_save"] or ())
    return raw


def _task(made: NewAdapter, saved: Collection[str]) -> dict[str, Any]:
    """The task of a class of models, and its head as one saved module.

    No task where the head is not saved whole: PEFT would look for it among the saved modules.
    """
    task = next((task for end, task in _TASKS.items() if str(made.task).endswith(end)), None)
    if not (heads := _HEADS.get(task or "")):
        return {"task_type": task}
    inside = {head: [name for name in made.besides if f"{name}.".startswith(f"{head}.")] for head in heads}
    whole = {head for head, names in inside.items() if names and set(names) <= set(saved)}
    if not whole:
        return {"task_type": None}
    others = {name for name in saved if not any(name in inside[head] for head in whole)}
    return {"task_type": task, "modules_to_save": sorted(others | whole)}


def _numbers(made: NewAdapter, config: Config | None) -> dict[str, Any]:
    """Ranks and alphas: as they were, where all factors are; else so that every scaling is as it must be."""
    if config and not config.adalora and all(made.carries(low) for _, low in made.low_ranks):
        return {}
    found: dict[str, tuple[int, float]] = {}
    for change, low in made.low_ranks:
        key = _key(change, low, config)
        own = config and made.carries(low)
        rank, scale = (config.rank(key), config.scaling(key)) if config and own else (low.rank, low.scale)
        found[key] = (rank, rank * scale)
    largest = max((rank for rank, _ in found.values()), default=1)
    return {
        "r": largest,
        "lora_alpha": largest,
        "use_rslora": False,
        "rank_pattern": {_anchored(key): rank for key, (rank, _) in found.items() if rank != largest},
        "alpha_pattern": {
            _anchored(key): int(alpha) if alpha == int(alpha) else alpha
            for key, (_, alpha) in found.items()
            if alpha != largest
        },
    }


def _anchored(key: str) -> str:
    return f"^{re.escape(key)}$"


def _key(change: Change, low: LowRank, config: Config | None) -> str:
    """What the patterns match for a change: the module, which for MultiheadAttention's out_proj is the outer one."""
    if config and _is_parameter(change.target, config):
        return change.target
    name = plain(low.A.name)
    return name.partition(".base_layer.")[0] if ".base_layer." in name else change.target.rpartition(".")[0]


def _is_parameter(target: str, config: Config) -> bool:
    """Whether a weight is adapted by `target_parameters`."""
    module = f".{target.rpartition('.')[0]}"
    named = any(f".{target}".endswith(f".{name}") for name in config.parameters)
    return named and not any(module.endswith(f".{name}") for name in config.modules)


def _beginnings(made: NewAdapter, before: Mapping[str, Any]) -> dict[str, Any]:
    """Starts and ways of training, kept only as far as they still say something of the factors."""
    changed: dict[str, Any] = {key: None for key in ("velora_config", "monteclora_config") if before.get(key)}
    carried = [low for _, low in made.low_ranks if made.carries(low)]
    if not any(low.blocks != (1, 1) for low in carried) and before.get("use_bdlora"):
        changed["use_bdlora"] = None
    if not any(low.start for low in carried):
        changed |= {"kasa_config": None} if before.get("kasa_config") else {}
        start = before.get("init_lora_weights")
        changed |= {"init_lora_weights": True} if isinstance(start, str) and start != "gaussian" else {}
    return changed


def _targets(made: NewAdapter, config: Config | None) -> dict[str, Any]:
    """The modules that have factors, where they are not those of before."""
    if made.targets is None:
        return {}
    every = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    parameters = [change for change, _ in made.low_ranks if config and _is_parameter(change.target, config)]
    named = {} if parameters or not config or not config.parameters else {"target_parameters": None}
    modules = {_key(change, low, config) for change, low in made.low_ranks if change not in parameters}
    return {"target_modules": _matching(made, modules), **(every if config else {}), **named}


def _matching(made: NewAdapter, modules: set[str]) -> list[str] | str:
    """What PEFT finds some modules by: ends of their names, or one pattern where those are ends of others' names, too."""
    names = set(made.targets or modules)
    others = (other.split(".") for other in made.besides - modules)
    if any(".".join(parts[start:]) in names for parts in others for start in range(len(parts))):
        return "|".join(re.escape(module) for module in sorted(modules))
    return sorted(names)


def _whole(made: NewAdapter, config: Config | None) -> dict[str, Any]:
    """What is saved whole: modules, and biases by themselves."""
    targets = [change.target for change in made.changes if isinstance(change.update, Full)]
    if config:
        return {} if targets else {"modules_to_save": None, "bias": "none"}
    adapted = {change.target.rpartition(".")[0] for change, _ in made.low_ranks}
    modules = {target.rpartition(".")[0] for target in targets if not target.endswith(".bias")} - adapted
    alone = {module for target in targets if (module := target.rpartition(".")[0]) not in modules}
    bias = "none" if not alone else "lora_only" if alone <= adapted else "all"
    return {"modules_to_save": sorted(modules) or None, "bias": bias}
