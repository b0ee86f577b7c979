"""PEFT's `adapter_config.json`: what each field that counts says of a module or a tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...adapters.updates import Start
from .fields import STARTS
from .types import checked

_EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules that PEFT saves whole of its own accord (its EMBEDDING_LAYER_NAMES)."""

Number = TypeVar("Number", int, float)


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
    biases: bool
    base: str | None
    revision: str | None
    start: Start | None
    keeps_ties: bool
    layers: tuple[int, ...]
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    block_diagonal: Mapping[str, Any]
    version: tuple[int, ...]
    task: str | None
    adalora: int | None
    """AdaLoRA's first rank, which its scaling is divided by; None for LoRA."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any], path: Path) -> Config:
        """Check types; PEFT's defaults stand in for absent fields."""
        fields = checked(raw, path)
        adalora = fields["peft_type"].upper() == "ADALORA"
        return cls(
            r=fields["r"],
            alpha=fields["lora_alpha"],
            use_rslora=fields["use_rslora"],
            use_dora=fields["use_dora"],
            rank_pattern=fields["rank_pattern"],
            alpha_pattern=fields["alpha_pattern"],
            modules_to_save=tuple(fields["modules_to_save"]),
            biases=fields["bias"] != "none",
            base=fields["base_model_name_or_path"] or None,
            revision=fields["revision"] or None,
            start=_start(raw),
            keeps_ties=fields["ensure_weight_tying"],
            layers=tuple(layer for pair in fields["layer_replication"] for layer in range(*pair)),
            parameters=tuple(fields["target_parameters"]),
            modules=tuple(names if isinstance(names := raw.get("target_modules"), list) else []),
            tokens=_tokens(fields["trainable_token_indices"]),
            block_diagonal=fields["use_bdlora"],
            version=_version(fields["peft_version"]),
            task=_task(raw),
            adalora=fields["init_r"] if adalora else None,
        )

    @property
    def kind(self) -> str:
        """What people call it."""
        if self.adalora:
            return "AdaLoRA"
        return "DoRA" if self.use_dora else self.start.value if self.start else "LoRA"

    def rank(self, module: str) -> int:
        """r of a module."""
        return _first_match(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """s of a module: alpha/r, or alpha/√r (rsLoRA, arXiv:2312.03732); AdaLoRA's has its own divisor."""
        if self.adalora:
            return self.alpha / (self.adalora + 1e-5)
        rank = self.rank(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rule(self, module: str) -> str:
        """How the scaling of a module comes about."""
        if self.adalora:
            return f"alpha {self.alpha:g} / init_r {self.adalora}"
        keys = [_first_key(pattern, module) for pattern in (self.alpha_pattern, self.rank_pattern)]
        alpha, rank = (
            f" ({name}_pattern {key!r})" if key else ""
            for name, key in zip(("alpha", "rank"), keys, strict=True)
        )
        numbers = _first_match(self.alpha_pattern, module, self.alpha), self.rank(module)
        return f"alpha {numbers[0]:g}{alpha} / {'√' if self.use_rslora else ''}rank {numbers[1]}{rank}"

    def saves(self, tensor: str) -> bool:
        """Whether a tensor belongs to a module that PEFT saves whole; as there, a suffix match without a dot."""
        parts = tensor.split(".")
        modules = [".".join(parts[:n]) for n in range(1, len(parts))]
        return any(module.endswith(saved) for module in modules for saved in self.modules_to_save)

    def index(self, module: str) -> tuple[int, ...]:
        """The rows of an embedding that were trained; a list in the config is for the input embedding."""
        named = (rows for name, rows in self.tokens.items() if f".{module}".endswith(f".{name}"))
        return next(named, self.tokens.get("", ()))

    def blocks(self, module: str) -> tuple[int, int]:
        """How many diagonal blocks A and B of a module have (BD-LoRA)."""
        count = self.block_diagonal.get("nblocks", 1)
        on_A, on_B = (
            any(pattern in module for pattern in self.block_diagonal.get(f"target_modules_bd_{side}") or ())
            for side in "ab"
        )
        return (count if on_A else 1, count if on_B else 1)

    def square_experts(self) -> tuple[bool, bool]:
        """Whether square experts were trained as (in, out): in models that keep them so, and in others.

        PEFT before 0.19 always did, 0.19.0 had it the wrong way round.
        """
        if self.version < (0, 19):
            return (True, True)
        return (False, True) if self.version == (0, 19, 0) else (True, False)


def is_saved_embedding(tensor: str) -> bool:
    """Whether a tensor is one that PEFT saves whole of its own accord, with an adapter or with new tokens."""
    parts = tensor.split(".")
    return len(parts) > 1 and parts[-2] in _EMBEDDINGS and parts[-1] == "weight"


def _start(raw: Mapping[str, Any]) -> Start | None:
    if raw.get("kasa_config"):
        return Start.KASA
    return STARTS.get(str(raw.get("init_lora_weights")).lower())


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    return (
        {name: tuple(rows) for name, rows in value.items()} if isinstance(value, dict) else {"": tuple(value)}
    )


def _version(text: str) -> tuple[int, ...]:
    """PEFT's version as numbers; files that do not say are older than 0.18."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _task(raw: Mapping[str, Any]) -> str | None:
    """The class of the model that was trained, or how its name ends."""
    mapping = raw.get("auto_mapping")
    if isinstance(mapping, dict) and isinstance(name := mapping.get("base_model_class"), str):
        return name
    endings = {
        "SEQ_CLS": "ForSequenceClassification",
        "TOKEN_CLS": "ForTokenClassification",
        "QUESTION_ANS": "ForQuestionAnswering",
        "CAUSAL_LM": "ForCausalLM",
    }
    return endings.get(str(raw.get("task_type")))


def _first_match(pattern: Mapping[str, Number], module: str, default: Number) -> Number:
    """The value of the first key that matches, in the order of the file (PEFT's get_pattern_key)."""
    key = _first_key(pattern, module)
    return default if key is None else pattern[key]


def _first_key(pattern: Mapping[str, Number], module: str) -> str | None:
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)
