"""Read PEFT's `adapter_config.json`: the types of its fields, and what they say of a module or a tensor."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta, Struct, field

from ...adapters.updates import Start
from ...errors import shown
from ...storage.json_files import checked
from .fields import STARTS

_EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules that PEFT saves whole of its own accord (its EMBEDDING_LAYER_NAMES)."""
MOST_LAYERS = 10_000

Number = TypeVar("Number", int, float)
Name = Annotated[str, Meta(min_length=1)]
Rank = Annotated[int, Meta(gt=0, lt=2**60)]
Row = Annotated[int, Meta(ge=0, lt=2**60)]
Alpha = Annotated[int, Meta(gt=0, lt=2**60)] | Annotated[float, Meta(gt=0, le=sys.float_info.max)]
"""A merge with an alpha of 0 changes nothing."""


class BlockDiagonal(Struct, frozen=True):
    """BD-LoRA's options: the number of diagonal blocks, and the modules whose A or B has blocks."""

    nblocks: Rank = 1
    target_modules_bd_a: tuple[Name, ...] | None = None
    target_modules_bd_b: tuple[Name, ...] | None = None


class Config(Struct, frozen=True):
    """The fields of adapter_config.json that decide what a merge does, with PEFT's defaults."""

    peft_type: str = "LORA"
    r: Rank = 8
    init_r: Rank = 12
    alpha: Alpha = field(name="lora_alpha", default=8)
    use_rslora: bool = False
    use_dora: bool = False
    keeps_ties: bool = field(name="ensure_weight_tying", default=False)
    rank_pattern: dict[str, Rank] = {}
    """Ranks by regexes of module names."""
    alpha_pattern: dict[str, Alpha] = {}
    modules_to_save: tuple[Name, ...] = ()
    parameters: tuple[Name, ...] = field(name="target_parameters", default=())
    bias: Literal["none", "all", "lora_only"] = "none"
    base_name: str = field(name="base_model_name_or_path", default="")
    base_revision: str = field(name="revision", default="")
    layer_replication: tuple[tuple[Row, Row], ...] = ()
    """Ranges of layers, first and past the last."""
    token_indices: tuple[Row, ...] | dict[str, tuple[Row, ...]] = field(
        name="trainable_token_indices", default_factory=dict
    )
    block_diagonal: BlockDiagonal = field(name="use_bdlora", default=BlockDiagonal())
    peft_version: Annotated[str, Meta(pattern=r"^\d{1,4}(\.\d{1,4})*(?!\d)")] = "0"
    init_lora_weights: Any = None
    kasa_config: Any = None
    target_modules: Any = None
    auto_mapping: Any = None
    task_type: Any = None

    def __post_init__(self) -> None:
        if sum(max(0, stop - start) for start, stop in self.layer_replication) > MOST_LAYERS:
            raise ValueError(f"layer_replication has more than {MOST_LAYERS} layers")
        for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if wrong := [pattern for pattern in patterns if not _is_regex(pattern)]:
                raise ValueError(f"{name}: {shown(wrong[0])} is not a valid regex")

    @classmethod
    def parse(cls, raw: Mapping[str, Any], path: Path) -> Config:
        """Check the types of a config's fields; null stands for PEFT's default.

        Raises MalformedError naming the field that has a wrong type.
        """
        masks = {"rank_pattern"} if str(raw.get("peft_type")).upper() == "ADALORA" else set()
        given = {name: value for name, value in raw.items() if value is not None and name not in masks}
        return checked(given, cls, str(path))

    @property
    def adalora(self) -> int | None:
        """AdaLoRA's first rank, which its scaling is divided by; None for LoRA."""
        return self.init_r if self.peft_type.upper() == "ADALORA" else None

    @property
    def base(self) -> str | None:
        """The name or path of the base."""
        return self.base_name or None

    @property
    def revision(self) -> str | None:
        """The base's revision."""
        return self.base_revision or None

    @property
    def biases(self) -> bool:
        """True if the adapter replaces biases."""
        return self.bias != "none"

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the base's layers in the order of the adapter's model; empty if none is repeated."""
        return tuple(layer for start, stop in self.layer_replication for layer in range(start, stop))

    @property
    def modules(self) -> tuple[str, ...]:
        """The names in target_modules; empty for a regex."""
        return tuple(self.target_modules) if isinstance(self.target_modules, list) else ()

    @property
    def start(self) -> Start | None:
        """The start of training that moved the base, if one did."""
        if self.kasa_config:
            return Start.KASA
        return STARTS.get(str(self.init_lora_weights).lower())

    @property
    def version(self) -> tuple[int, ...]:
        """PEFT's version as numbers; a file without a version is older than 0.18."""
        return tuple(int(part) for part in re.findall(r"\d+", self.peft_version)[:3])

    @property
    def task(self) -> str | None:
        """The class of the model that was trained, or the ending of its name."""
        mapping = self.auto_mapping
        if isinstance(mapping, dict) and isinstance(name := mapping.get("base_model_class"), str):
            return name
        endings = {
            "SEQ_CLS": "ForSequenceClassification",
            "TOKEN_CLS": "ForTokenClassification",
            "QUESTION_ANS": "ForQuestionAnswering",
            "CAUSAL_LM": "ForCausalLM",
        }
        return endings.get(str(self.task_type))

    @property
    def kind(self) -> str:
        """The method's name."""
        if self.adalora:
            return "AdaLoRA"
        return "DoRA" if self.use_dora else self.start.value if self.start else "LoRA"

    def rank(self, module: str) -> int:
        """Return r of a module."""
        return _first_match(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """Return s of a module: alpha/r, alpha/√r (rsLoRA, arXiv:2312.03732), or AdaLoRA's alpha/init_r."""
        if self.adalora:
            return self.alpha / (self.adalora + 1e-5)
        rank = self.rank(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rule(self, module: str) -> str:
        """Return the formula of a module's scaling, for people."""
        if self.adalora:
            return f"alpha {self.alpha:g} / init_r {self.adalora}"
        keys = [_first_key(pattern, module) for pattern in (self.alpha_pattern, self.rank_pattern)]
        alpha, rank = (
            f" ({name}_pattern {key!r})" if key else "" for name, key in zip(("alpha", "rank"), keys, strict=True)
        )
        numbers = _first_match(self.alpha_pattern, module, self.alpha), self.rank(module)
        return f"alpha {numbers[0]:g}{alpha} / {'√' if self.use_rslora else ''}rank {numbers[1]}{rank}"

    def saves(self, tensor: str) -> bool:
        """Return True if PEFT saves a tensor's module whole: as in PEFT, a suffix match without a dot."""
        parts = tensor.split(".")
        modules = [".".join(parts[:n]) for n in range(1, len(parts))]
        return any(module.endswith(saved) for module in modules for saved in self.modules_to_save)

    def index(self, module: str) -> tuple[int, ...]:
        """Return the trained rows of an embedding; a list in the config is for the input embedding."""
        indices = self.token_indices
        tokens = indices if isinstance(indices, dict) else {"": indices}
        named = (rows for name, rows in tokens.items() if f".{module}".endswith(f".{name}"))
        alone = next(iter(tokens.values())) if len(tokens) == 1 else ()  # a tied head has the embedding's rows
        return next(named, tokens.get("", alone))

    def blocks(self, module: str) -> tuple[int, int]:
        """Return the numbers of diagonal blocks that A and B of a module have (BD-LoRA)."""
        options = self.block_diagonal
        on_A, on_B = (
            any(pattern in module for pattern in patterns or ())
            for patterns in (options.target_modules_bd_a, options.target_modules_bd_b)
        )
        return (options.nblocks if on_A else 1, options.nblocks if on_B else 1)

    def square_experts(self) -> tuple[bool, bool]:
        """Return True if square experts are (in, out): in models that store them so, and in all others.

        PEFT before 0.19 always trained them so; 0.19.0 had it the wrong way round.
        """
        if self.version < (0, 19):
            return (True, True)
        return (False, True) if self.version == (0, 19, 0) else (True, False)


def is_saved_embedding(tensor: str) -> bool:
    """Return True if PEFT saves a tensor whole of its own accord, with an adapter or with new tokens."""
    parts = tensor.split(".")
    return len(parts) > 1 and parts[-2] in _EMBEDDINGS and parts[-1] == "weight"


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _first_match(pattern: Mapping[str, Number], module: str, default: Number) -> Number:
    """Return the value of the first key that matches, in the order of the file (PEFT's get_pattern_key)."""
    key = _first_key(pattern, module)
    return default if key is None else pattern[key]


def _first_key(pattern: Mapping[str, Number], module: str) -> str | None:
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)
