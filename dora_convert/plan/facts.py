"""List everything that an update says, as JSON."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from ..storage.safetensors import StoredTensor


def facts_of(value: object) -> Any:
    """Return the fields of an update without paths: tensors by name, other updates by their fields."""
    if isinstance(value, StoredTensor):
        return value.name
    if is_dataclass(value):
        return [type(value).__name__, *(facts_of(getattr(value, field.name)) for field in fields(value))]
    if isinstance(value, tuple):
        return [facts_of(each) for each in value]
    return value.value if isinstance(value, Enum) else value
