"""Read PEFT's `adapter_config.json`: what its fields say of a module or a tensor, and which fields are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, Struct, field

from ...adapters import Start, unwrapped
from ...errors import Fault, UnsupportedError, shown
from ...storage.json_files import checked

if TYPE_CHECKING:
    from .patterns import PatternTable

_EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules that PEFT saves whole of its own accord (its EMBEDDING_LAYER_NAMES)."""
MOST_LAYERS = 10_000

SCHEDULE = {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
"""AdaLoRA's own fields, which only training reads."""
_HARMLESS = SCHEDULE | {
    # the trained modules and the course of training: the tensors on disk already tell
    "lora_bias", "inference_mode", "lora_dropout",
    "runtime_config", "megatron_config", "megatron_core", "velora_config", "monteclora_config",
    # starting points of training, which count only if init_lora_weights names them
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # saved as the last layer had it, so shapes decide; and flags that only GPTQ layers read
    "fan_in_fan_out", "use_qalora", "qalora_group_size",
}  # fmt: skip
_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only, so no single weight equals it",
    "arrow_config": "an Arrow router chooses among adapters per token, so no single weight equals it",
}
_PER_INPUT = {
    "XLORA", "POLY", "LILY", "SHADOW", "CARTRIDGE", "ADAPTION_PROMPT", "PROMPT_TUNING", "P_TUNING",
    "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT",
}  # fmt: skip
"""Methods that depend on the input or add to the input, so that no single weight equals them."""
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights with which training leaves the base as it is."""
_RESIDUAL = "merge it into the residual base saved at training, with --ignore-field init_lora_weights"
_LOST_STARTS = {
    "pissa_niter": f"training began with a random approximation of the base's SVD, now lost: {_RESIDUAL}",
    "corda": f"training moved the base by statistics that are not in the adapter: {_RESIDUAL}",
    "loftq": f"training began with a quantised base: {_RESIDUAL}",
    "lora_ga": f"training moved the base by gradients that are not in the adapter: {_RESIDUAL}",
}
LORA = ("LORA", "ADALORA")
TASKS = {
    "LMHeadModel": "CAUSAL_LM", "ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip
"""PEFT's name of a task by the end of a class name. PEFT wraps any other class as it is."""
STARTS = {"pissa": Start.PISSA, "olora": Start.OLORA}

Name = Annotated[str, Meta(min_length=1)]
Rank = Annotated[int, Meta(gt=0, lt=2**60)]
Row = Annotated[int, Meta(ge=0, lt=2**60)]
Alpha = Annotated[int, Meta(gt=-(2**60), lt=2**60)] | Annotated[float, Meta(ge=-1.7e308, le=1.7e308)]
"""Negative numbers subtract, in PEFT too; 0 is refused."""


class BlockDiagonal(Struct, frozen=True):
    """BD-LoRA's options: the number of diagonal blocks, and the modules whose A or B has blocks."""

    nblocks: Rank = 1
    target_modules_bd_a: tuple[Name, ...] | None = None
    target_modules_bd_b: tuple[Name, ...] | None = None


class Config(Struct, frozen=True, dict=True):
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
    base: str = field(name="base_model_name_or_path", default="")
    revision: str = ""
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
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    auto_mapping: Any = None
    task_type: Any = None

    def __post_init__(self) -> None:
        if sum(max(0, stop - start) for start, stop in self.layer_replication) > MOST_LAYERS:
            raise ValueError(f"layer_replication has more than {MOST_LAYERS} layers")
        for name, alphas in (("lora_alpha", [self.alpha]), ("alpha_pattern", self.alpha_pattern.values())):
            if not all(alphas):
                raise ValueError(f"{name} is 0, so PEFT adds nothing of the factors: write the alpha of the training")
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

    @cached_property
    def adalora(self) -> int | None:
        """AdaLoRA's first rank, which its scaling is divided by; None for LoRA."""
        return self.init_r if self.peft_type.upper() == "ADALORA" else None

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the base's layers in the order of the adapter's model; empty if none is repeated."""
        return tuple(layer for start, stop in self.layer_replication for layer in range(start, stop))

    @property
    def modules(self) -> tuple[str, ...]:
        """The names in target_modules; empty for a regex."""
        return tuple(self.target_modules) if isinstance(self.target_modules, list) else ()

    @cached_property
    def start(self) -> Start | None:
        """The start of training that moved the base, if one did."""
        if self.kasa_config:
            return Start.KASA
        return STARTS.get(str(self.init_lora_weights).lower())

    @cached_property
    def version(self) -> tuple[int, ...]:
        """PEFT's version as numbers; a file without a version is older than 0.18."""
        return tuple(int(part) for part in re.findall(r"\d+", self.peft_version)[:3])

    @property
    def task(self) -> str | None:
        """The class of the model that was trained, or the ending of its name."""
        mapping = self.auto_mapping
        if isinstance(mapping, dict) and isinstance(name := mapping.get("base_model_class"), str):
            return name
        return {task: end for end, task in TASKS.items()}.get(str(self.task_type))

    @property
    def kind(self) -> str:
        """The method's name."""
        if self.adalora:
            return "AdaLoRA"
        return "DoRA" if self.use_dora else self.start.value if self.start else "LoRA"

    @cached_property
    def _ranks(self) -> PatternTable[int]:
        from .patterns import PatternTable

        return PatternTable(self.rank_pattern)

    @cached_property
    def _alphas(self) -> PatternTable[float]:
        from .patterns import PatternTable

        return PatternTable(self.alpha_pattern)

    def refuse_slow_patterns(self, modules: Collection[str]) -> None:
        """Raise MalformedError if a key of a table takes too long to match with the names of modules."""
        if not (self.rank_pattern or self.alpha_pattern):
            return
        from .patterns import as_key, refuse_slow

        names = {module.partition(".base_layer")[0] for module in modules}
        names |= set(map(unwrapped, names))
        names |= {f"{module}.{name.rpartition('.')[2]}" for module in names for name in self.parameters}
        tables: dict[str, Collection[str]] = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        refuse_slow([(field, key, as_key(key)) for field, table in tables.items() for key in table], names)

    def has_pattern(self, module: str) -> bool:
        """Return True if a key of a table matches a module."""
        return bool(
            (self.rank_pattern and self._ranks.find(module, self.r)[1])
            or (self.alpha_pattern and self._alphas.find(module, self.alpha)[1])
        )

    def rank(self, module: str) -> int:
        """Return r of a module."""
        return self._ranks.find(module, self.r)[0] if self.rank_pattern else self.r

    def scaling(self, module: str) -> float:
        """Return s of a module: alpha/r, alpha/√r (rsLoRA, arXiv:2312.03732), or AdaLoRA's alpha/init_r."""
        if self.adalora:
            return self.alpha / (self.adalora + 1e-5)
        rank = self.rank(module)
        alpha = self._alphas.find(module, self.alpha)[0] if self.alpha_pattern else self.alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rule(self, module: str) -> str:
        """Return the formula of a module's scaling, for people."""
        if self.adalora:
            return f"alpha {self.alpha:g} / init_r {self.adalora}"
        alpha, key = self._alphas.find(module, self.alpha) if self.alpha_pattern else (self.alpha, "")
        text = f"alpha {alpha:g}" + (f" (alpha_pattern {key!r})" if key else "")
        rank, key = self._ranks.find(module, self.r) if self.rank_pattern else (self.r, "")
        return f"{text} / {'√' * self.use_rslora}rank {rank}" + (f" (rank_pattern {key!r})" if key else "")

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
        sides = (options.target_modules_bd_a, options.target_modules_bd_b)
        on_A, on_B = (any(pattern in module for pattern in each) if each else False for each in sides)
        return (options.nblocks if on_A else 1, options.nblocks if on_B else 1)

    @cached_property
    def square_experts(self) -> tuple[bool, bool]:
        """True if square experts are (in, out): in models that store them so, and in all others.

        PEFT before 0.19 always trained them so; 0.19.0 had it the wrong way round.
        """
        if self.version < (0, 19):
            return (True, True)
        return (False, True) if self.version == (0, 19, 0) else (True, False)


def refuse_unsupported(raw: Mapping[str, Any], name: str, accepted: Collection[str]) -> None:
    """Refuse by name everything that this reader does not apply, except the `accepted` fields."""
    if (kind := raw.get("peft_type")) is None:
        raise UnsupportedError(f"The adapter {name} is not PEFT's: its config has no peft_type.")
    if str(kind).upper() not in LORA:
        reason = "no single weight equals it" if str(kind) in _PER_INPUT else "this version does not merge it"
        raise UnsupportedError(f"The adapter {name} is of peft_type {kind!r}: {reason}.")
    faults = [
        Fault(f"{field}={value!r}"[:60], why)
        for field, value in raw.items()
        if field not in accepted and value and value != "none" and (why := _objection(field, value))
    ]
    if faults:
        raise UnsupportedError(
            f"The adapter {name} uses what this version does not merge.",
            faults=faults,
            hint="--ignore-field NAME accepts a field that you know to change nothing",
        )


def _objection(field: str, value: Any) -> str | None:
    """Return why a field that is set stops a merge; None if it does not."""
    if field == "init_lora_weights" and isinstance(value, str):
        start = value.lower()
        if start in _PLAIN_STARTS or start in STARTS:
            return None
        known = (why for begins, why in _LOST_STARTS.items() if start.startswith(begins))
        return next(known, "a start of training that this version does not know")
    if field in _HARMLESS or field in Config.__struct_encode_fields__:
        return None
    return _REFUSED.get(field, "a field this version does not know")


def is_saved_embedding(tensor: str) -> bool:
    """Return True if PEFT saves a tensor whole of its own accord, with an adapter or with new tokens."""
    parts = tensor.split(".")
    return len(parts) > 1 and parts[-2] in _EMBEDDINGS and parts[-1] == "weight"


def _is_regex(pattern: str) -> bool:
    try:
        return bool(re.compile(rf"(.*\.)?({pattern})$"))  # as PEFT uses it
    except re.error:
        return False
