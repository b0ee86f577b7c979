"""Say what a kind of PEFT adapter is: its tensors, its config fields, and how a module's tensors make an update."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ....adapters import Update
from ....storage.json_files import checked
from ....storage.safetensors import StoredTensor
from ..config import Config

Value = TypeVar("Value")
ALWAYS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_weights", "layers_pattern", "layers_to_transform", "module_dropout", "modules_to_save",
    "peft_type", "peft_version", "rank_dropout", "rank_dropout_scale", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type",
})  # fmt: skip
"""Fields that every kind may have: they change nothing, or decide what is saved beside the kind's own tensors."""


@dataclass(frozen=True)
class Fields:
    """The fields of one adapter_config.json, and the parsed ones that all kinds share."""

    raw: Mapping[str, Any]
    config: Config

    def get(self, name: str, form: type[Value], default: Value) -> Value:
        """Return a field of a type; MalformedError names a field of another type."""
        value = self.raw.get(name)
        return default if value is None else checked(value, form, f"adapter_config.json: {name}")


@dataclass(frozen=True)
class KindModule:
    """One module's tensors by role, with the tensors that all modules share."""

    name: str
    parts: Mapping[str, StoredTensor]
    fields: Fields


@dataclass(frozen=True)
class Kind:
    """A kind of adapter, for one value of peft_type."""

    name: str
    parts: Mapping[str, str]
    """A part's role, by the end of a tensor's name."""
    needed: tuple[str, ...]
    """The roles that each module must have."""
    make: Callable[[KindModule], Update | str]
    """Returns a module's update, or the reason why its tensors make none."""
    fields: Collection[str] = ()
    """The kind's own config fields that change nothing, or that `make` reads."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """The roles of tensors that all modules share, by their whole names."""
    refuse: Callable[[Fields], str | None] = lambda _: None
    """Returns why an adapter as a whole is not merged; None if it is."""
    rule: Callable[[Fields, str], str] = lambda _, __: ""
    """Returns the formula of a module's scaling, for people."""
    scales_bias: bool = False
    """True if the bias of a module is scaled as its outputs are."""
