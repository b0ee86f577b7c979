"""List everything that decides an output tensor, as JSON without paths: for a plan's fingerprint."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from ..adapters import Decomposed, Delta, Full
from ..storage.safetensors import StoredTensor
from .item import Edit, Item


def describe(item: Item) -> list[Any]:
    """Return what decides an output tensor."""
    source = item.source
    rows = [[rows.value.name, rows.index] for rows in item.rows]
    edits = [_describe_edit(edit) for edit in item.edits]
    known = [item.name, item.dtype, item.shape, item.origin, source.name, item.replaced, rows, edits]
    if item.undo:
        known.append([stored.name for stored in item.undo.tensors])
    if source.coded:
        known += [repr(getattr(source, "scheme", "")), [part.name for _, part in item.parts]]
    return known


def _describe_edit(edit: Edit) -> list[Any]:
    update, low = edit.update, edit.low
    tensors = update.tensors
    known: list[Any] = [type(update).__name__, edit.transposed, edit.weight, [each.name for each in tensors]]
    known += [list(edit.outputs)] if edit.outputs else []
    if views := [tensor for tensor in tensors if tensor.is_view]:
        from ..storage.stored_view import describe_view

        known += map(describe_view, views)
    if isinstance(update, (Delta, Full)):
        return [*known, update.scale] if isinstance(update, Delta) else known
    if not low or (isinstance(update, Decomposed) and not _is_usual(update)):
        known += [facts_of(update), *([describe(edit.follows)] if edit.follows else [])]
    return known if not low else [*known, low.rank, low.scale, low.blocks, low.experts, low.start and low.start.value]


def _is_usual(update: Decomposed) -> bool:
    """Return True for a DoRA as in its paper."""
    return update.axis == "rows" and update.norm_scale is None and not (update.normalised or update.offset)


def facts_of(value: object) -> Any:
    """Return the fields of an update without paths: tensors by name, other updates by their fields."""
    if isinstance(value, StoredTensor):
        return value.name
    if is_dataclass(value):
        return [type(value).__name__, *(facts_of(getattr(value, field.name)) for field in fields(value))]
    if isinstance(value, tuple):
        return [facts_of(each) for each in value]
    return value.value if isinstance(value, Enum) else value
