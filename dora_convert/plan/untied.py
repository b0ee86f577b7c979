"""Make two weights of an embedding and a head that were one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..adapters import Rows
from .plan import Entry
from .shapes import TargetTensor


def resize(targets: Mapping[str, TargetTensor], ledger: list[Entry], name: str, other: str) -> str | None:
    """Give one side of a former tie as many rows as an adapter's tensor for the other side has.

    Its new rows are not in the adapter's file. They began as the other side's: the returned warning says so.
    """
    target, saved = targets[name], targets[other].source
    if target.source is not target.base or saved is targets[other].base:
        return None
    if (new := saved.shape[0]) < (height := target.shape[0]):
        target.source = replace(target.source, shape=(new, *target.source.shape[1:]))
    if new <= height:
        return None
    start = saved.start + height * (saved.nbytes // new)
    tail = replace(saved, shape=(new - height, *saved.shape[1:]), start=start)
    target.rows.append(Rows(tail, tuple(range(height, new))))
    for k, entry in enumerate(ledger):
        if entry.tensor == saved.name and entry.into:
            ledger[k] = Entry(entry.tensor, entry.fate, (*entry.into, name), entry.why)
    return (
        f"{new - height} new rows of {name} are in no file: they are taken from the adapter's {other}, where they began"
    )
