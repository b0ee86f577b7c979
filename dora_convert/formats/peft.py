r"""PEFT's adapter folders: `adapter_config.json` beside `adapter_model.safetensors`.

Tensor names are `base_model.model.<module>` and a suffix, shapes for a weight of (out, in):

    .lora_A.weight  (r, in)      .lora_B.weight  (out, r)      Linear, and GPT-2's Conv1D
    .lora_A.weight  (r, in, *k)  .lora_B.weight  (out, r, 1…)  convolutions
    .lora_embedding_A  (r, rows) .lora_embedding_B  (dim, r)   embeddings, whose weight is (rows, dim)
    .lora_magnitude_vector       (out), (dim) or (1, out, 1…)  DoRA; some versions append `.weight`
    .base_layer.weight                                         the base's own tensor, saved beside its adapter
    <module>.<key>                                             a module of `modules_to_save`, absolute values

The scaling is alpha/r, or alpha/√r with `use_rslora`, where `rank_pattern` and `alpha_pattern` may change r and alpha
per module: the first key in the order of the file that matches `(.*\.)?(key)$` counts.

What a config can say beyond that is refused by name, never merged wrongly: see `_REFUSED`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..adapter import Adapter, Change
from ..checkpoint import read_json
from ..errors import Fault, MalformedError, PlanError, UnsupportedError
from ..refs import Source
from ..stored import FLOATS, Stored, read_header
from ..updates import Decomposed, Full, LowRank

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}
_EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules that PEFT saves whole of its own accord (its EMBEDDING_LAYER_NAMES)."""

_USED = {
    "peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "use_dora", "modules_to_save", "init_lora_weights",
}  # fmt: skip
_HARMLESS = {
    # what was trained, and how: the tensors on disk already tell
    "task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules",
    "lora_dropout", "layers_to_transform", "layers_pattern", "runtime_config", "megatron_config", "megatron_core",
    # starting points of training, which count only where init_lora_weights names them
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # saved as the last layer had it, so the shapes decide; and a flag that only GPTQ layers read
    "fan_in_fan_out", "use_qalora", "qalora_group_size",
}  # fmt: skip
_REFUSED = {
    "bias": "trained biases are not merged yet",
    "lora_bias": "biases on lora_B are not merged yet",
    "layer_replication": "replicated layers are not written out yet",
    "target_parameters": "adapters on bare parameters (fused experts) are not merged yet",
    "trainable_token_indices": "single trained token rows are not merged yet",
    "ensure_weight_tying": "adapters on tied weights are not merged yet",
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only, so no single weight equals it",
    "arrow_config": "an Arrow router chooses among adapters per token, so no single weight equals it",
    "use_bdlora": "block-diagonal LoRA is not merged yet",
    "velora_config": "VeLoRA is not merged yet",
    "monteclora_config": "MonteCLoRA is not merged yet",
    "kasa_config": "KaSA is not merged yet",
}
Number = TypeVar("Number", int, float)

_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base as it is."""


def recognises(path: Path) -> bool:
    """Whether the folder is a PEFT adapter."""
    return (path / CONFIG).is_file()


def read(source: Source) -> Adapter:
    """Read a PEFT adapter's config and headers.

    Raises MalformedError for values of a wrong type, UnsupportedError for what is recognised and refused, PlanError
    when tensors and config contradict each other.
    """
    raw = read_json(source.path / CONFIG)
    _refuse(raw, source.name)
    config = _Config.parse(raw, source.path / CONFIG)
    tensors = read_header(_weights(source)).tensors
    changes, faults = _changes(tensors, config)
    if faults:
        raise PlanError(
            f"The adapter {source.name} contradicts itself in {len(faults)} places.", faults=faults
        )
    return Adapter(
        source=source,
        format="peft",
        kind="DoRA" if config.use_dora else "LoRA",
        changes=tuple(changes),
        tensors=tensors,
        files=(source.path / CONFIG, source.path / WEIGHTS),
        base=config.base,
        revision=config.revision,
    )


def _weights(source: Source) -> Path:
    path = source.path / WEIGHTS
    if path.exists():
        return path
    if (source.path / "adapter_model.bin").exists():
        raise UnsupportedError(
            f"The adapter {source.name} is a pickle (adapter_model.bin), which is not read yet.",
            hint="load it with PEFT and save it again: it writes safetensors",
        )
    raise MalformedError(f"The adapter {source.name} has {CONFIG} but no {WEIGHTS}.")


def _refuse(raw: Mapping[str, Any], name: str) -> None:
    """Refuse by name whatever this reader does not apply."""
    if (kind := raw.get("peft_type")) != "LORA":
        raise UnsupportedError(
            f"The adapter {name} is of peft_type {kind!r}; only LORA (with DoRA) is merged yet."
        )
    faults = []
    for field, value in raw.items():
        if field == "init_lora_weights" and isinstance(value, str) and value not in _PLAIN_STARTS:
            faults.append(
                Fault(f"{field}={value!r}", "this start changes the base weights; not reproduced yet")
            )
        elif field in _USED | _HARMLESS or not value or value == "none":
            continue
        elif field in _REFUSED:
            faults.append(Fault(f"{field}={value!r}"[:60], _REFUSED[field]))
        else:
            faults.append(Fault(f"{field}={value!r}"[:60], "a field this version does not know"))
    if faults:
        raise UnsupportedError(f"The adapter {name} uses what this version does not merge.", faults=faults)


@dataclass(frozen=True)
class _Config:
    """The fields of adapter_config.json that decide what a merge does."""

    r: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    base: str | None
    revision: str | None

    @classmethod
    def parse(cls, raw: Mapping[str, Any], path: Path) -> _Config:
        """Check types; PEFT's defaults stand in for absent fields."""

        def get(field: str, default: Any, check: Callable[[Any], bool], wants: str) -> Any:
            value = raw.get(field)
            value = default if value is None else value
            if not check(value):
                raise MalformedError(f"{path}: {field} must be {wants}, not {value!r}.")
            return value

        def text(field: str) -> str | None:
            return get(field, "", lambda value: isinstance(value, str), "a string") or None

        return cls(
            r=get("r", 8, _is_rank, "a positive integer"),
            alpha=get("lora_alpha", 8, _is_alpha, "a positive number: otherwise a merge changes nothing"),
            use_rslora=get("use_rslora", False, _is_bool, "true or false"),
            use_dora=get("use_dora", False, _is_bool, "true or false"),
            rank_pattern=get(
                "rank_pattern", {}, lambda v: _is_pattern(v, _is_rank), "regexes to positive integers"
            ),
            alpha_pattern=get(
                "alpha_pattern", {}, lambda v: _is_pattern(v, _is_alpha), "regexes to positive numbers"
            ),
            modules_to_save=tuple(get("modules_to_save", [], _is_names, "a list of module names")),
            base=text("base_model_name_or_path"),
            revision=text("revision"),
        )

    def rank(self, module: str) -> int:
        """r of a module."""
        return _first_match(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """s of a module: alpha/r, or alpha/√r (rsLoRA, arXiv:2312.03732)."""
        rank = self.rank(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, tensor: str) -> bool:
        """Whether a tensor belongs to a module that PEFT saves whole; as there, a suffix match without a dot."""
        parts = tensor.split(".")
        modules = [".".join(parts[:n]) for n in range(1, len(parts))]
        if any(module.endswith(saved) for module in modules for saved in self.modules_to_save):
            return True
        return len(parts) > 1 and parts[-2] in _EMBEDDINGS and parts[-1] == "weight"


def _first_match(pattern: Mapping[str, Number], module: str, default: Number) -> Number:
    """The value of the first key that matches, in the order of the file (PEFT's get_pattern_key)."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and value > 0 and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_pattern(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(check(item) and _is_regex(key) for key, item in value.items())


def _is_regex(key: str) -> bool:
    try:
        re.compile(key)
    except re.error:
        return False
    return True


def _changes(tensors: Mapping[str, Stored], config: _Config) -> tuple[list[Change], list[Fault]]:
    """Sort tensors into updates by their names."""
    changes: list[Change] = []
    faults: list[Fault] = []
    modules: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        target = name.removeprefix(PREFIX)
        suffix = next((suffix for suffix in _PARTS if target.endswith(suffix)), None)
        if suffix:
            parts = modules.setdefault(target.removesuffix(suffix), {})
            if _PARTS[suffix] in parts:
                faults.append(Fault(name, f"says what {parts[_PARTS[suffix]].name} says already"))
            parts[_PARTS[suffix]] = tensor
        elif target.endswith(".base_layer.weight"):
            changes.append(Change(target.replace(".base_layer.weight", ".weight"), Full(tensor)))
        elif config.saves(target):
            changes.append(Change(target, Full(tensor)))
        else:
            faults.append(Fault(name, "neither a LoRA tensor nor part of modules_to_save"))
    for module, parts in modules.items():
        found = _update(module, parts, config)
        if isinstance(found, Fault):
            faults.append(found)
        else:
            changes.append(Change(f"{module}.weight", found))
    return changes, faults


def _update(module: str, parts: Mapping[str, Stored], config: _Config) -> LowRank | Decomposed | Fault:
    """One module's update, or what is wrong with it."""
    if why := _contradiction(module, parts, config):
        return Fault(module, why)
    A, m = parts["A"], parts.get("m")
    update = LowRank(A, parts["B"], config.scaling(module), _orientation(A))
    return Decomposed(update, m) if m else update


def _contradiction(module: str, parts: Mapping[str, Stored], config: _Config) -> str | None:
    """Why a module's tensors make no update, or None where they do."""
    if missing := sorted({"A", "B"} - parts.keys()):
        return f"has no lora_{missing[0]}"
    if odd := [part for part in parts.values() if part.dtype not in FLOATS]:
        return f"is stored as {odd[0].dtype}; adapters of that dtype are not merged"
    if ".base_layer" in module:
        return "an adapter inside a wrapped layer (MultiheadAttention, experts) is not merged yet"
    if ("m" in parts) != config.use_dora:
        if config.use_dora:
            return "use_dora is set, but there is no lora_magnitude_vector"
        return "there is a lora_magnitude_vector, but use_dora is not set"
    A, B, rank = parts["A"].shape, parts["B"].shape, config.rank(module)
    if len(A) > 2 and len(B) > 1 and B[1] < rank == A[0]:
        return "a grouped convolution; not merged yet"
    if len(A) < 2 or len(B) < 2 or not A[0] == B[1] == rank:
        return f"the config says rank {rank}; lora_A is {A} and lora_B is {B}"
    return None


def _orientation(A: Stored) -> bool | None:
    if A.name.endswith(".lora_embedding_A"):
        return True
    return None if len(A.shape) == 2 else False
