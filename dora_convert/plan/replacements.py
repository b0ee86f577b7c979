"""Put an adapter's tensor, or some rows of it, in the place of the base's; or say why that cannot be."""

from __future__ import annotations

from typing import Protocol

from ..adapters import Full, Rows
from ..storage.reader import same_bytes
from ..storage.safetensors import StoredTensor
from .item import Edit


class Target(Protocol):
    """One tensor of the output, as far as it has been decided."""

    source: StoredTensor
    base: StoredTensor | None
    replacer: str
    rows: list[Rows]
    edits: list[Edit]


Refusals = tuple[list[str], str | None]
"""The faults that were found, and a warning."""


def put(update: Full | Rows, target: Target, name: str, *, by: str, chained: bool) -> Refusals:
    """Replace a tensor, or rows of it, by those of the adapter `by`."""
    if isinstance(update, Rows):
        return _replace_rows(update, target, name, chained=chained)
    return _replace_tensor(update, target, name, by=by, chained=chained)


def _replace_tensor(update: Full, target: Target, name: str, *, by: str, chained: bool) -> Refusals:
    """Replace a tensor; in a chain, the last adapter's stays."""
    value, again = update.value, target.source is not target.base
    from_one_folder = target.source.path.parent == value.path.parent
    if (from_one_folder or again) and same_bytes(target.source, value):
        return [], None  # one weight saved under two names, in two files, or by two adapters
    faults, warning = [], None
    if again and (from_one_folder or not chained):
        faults.append(_conflict(target, name, by))
    if chained and (again or target.edits or target.rows):
        warning = f"{by} replaces {name}: what the adapters before it made of it is gone"
        target.edits, target.rows = [], []
    target.source, target.replacer = value, by
    return faults, warning


def _replace_rows(update: Rows, target: Target, name: str, *, chained: bool) -> Refusals:
    """Replace rows of a tensor, unless another adapter replaces one of them by other values."""
    if any(rows.index == update.index and same_bytes(rows.value, update.value) for rows in target.rows):
        return [], None
    faults, taken = [], {row for rows in target.rows for row in rows.index}
    if chained and target.edits:
        faults.append(f"replaces rows of {name}, which an adapter before it changes: merge them one by one")
    if shared := sorted(taken.intersection(update.index)):
        faults.append(f"another adapter replaces row {shared[0]} of {name}, too")
    target.rows.append(update)
    return faults, None


def _conflict(target: Target, name: str, by: str) -> str:
    """Return why a tensor cannot be replaced once more."""
    if not target.replacer or target.replacer == by:
        return f"it replaces {name}, too, with other values"
    return (
        f"{target.replacer} and {by} both replace {name}, with other values: --method linear adds both changes, "
        f"--method chain takes the last, --exclude {name.rpartition('.')[0]} keeps the base's"
    )
