"""Tell which weights are of one kind, so that a step can be done for a stack of them: (weights, rows, columns).

Most weights are changed by one plain LoRA or DoRA, and small ones cost more for calls than for numbers.
"""

from __future__ import annotations

from typing import NamedTuple

from ..adapters import Decomposed, LowRank
from .item import Edit, Item

ROUNDED = ("BF16", "F16", "F32")
_KEPT = "kind of its stack"
STORED = frozenset({*ROUNDED, "F64"})


class StackKind(NamedTuple):
    """The properties that all weights of one stack share."""

    matrix: tuple[int, int]
    rank: int
    dtypes: tuple[str, ...]
    """Of the base's weight, of the written one, of A, B and m."""


def kind_of(item: Item) -> StackKind | None:
    """Return the kind of a weight's stack; None for a weight that is not W + s·BA or m·(W + s·BA)/‖W + s·BA‖.

    The item keeps the answer.
    """
    if _KEPT not in vars(item):
        vars(item)[_KEPT] = _kind_of(item)
    kind: StackKind | None = vars(item)[_KEPT]
    return kind


def _kind_of(item: Item) -> StackKind | None:
    if len(item.edits) != 1 or item.dtype not in ROUNDED or not _is_plain(item):
        return None
    edit = item.edits[0]
    low = edit.low
    if not low or not _is_plain_edit(edit) or not _is_plain_low_rank(low):
        return None
    m = (edit.update.m,) if isinstance(edit.update, Decomposed) else ()
    tensors = (item.source, low.A, low.B, *m)
    for tensor in tensors:
        if tensor.is_view or tensor.coded or tensor.dtype not in STORED:
            return None
    rows, columns = item.matrix
    if not rows * columns or (low.B.matrix[0], low.A.matrix[1]) != (rows, columns) or (m and m[0].numel != rows):
        return None
    return StackKind(item.matrix, low.rank, (item.dtype, *(tensor.dtype for tensor in tensors)))


def _is_plain(item: Item) -> bool:
    """Return True if the rows of an item are those of the base, with edits that are added up."""
    odd = item.rows or item.parts or item.undo or item.combination or item.grown
    return item.source is item.base and not odd


def _is_plain_edit(edit: Edit) -> bool:
    """Return True for a whole edit by rows of the weight as it is stored."""
    if edit.transposed or edit.outputs or edit.weight != 1 or edit.follows:
        return False
    return isinstance(edit.update, LowRank) or (edit.divides and edit.axis == 1 and edit.norm_ratio == 1)


def _is_plain_low_rank(low: LowRank) -> bool:
    return not (low.start or low.experts or low.d or low.b or low.widest) and low.blocks == (1, 1)
