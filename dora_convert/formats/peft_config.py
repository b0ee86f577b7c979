"""PEFT's `adapter_config.json`: what each field means for a merge, and what is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import Fault, MalformedError, UnsupportedError

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


def refuse_unsupported(raw: Mapping[str, Any], name: str) -> None:
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
class Config:
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
    def parse(cls, raw: Mapping[str, Any], path: Path) -> Config:
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
