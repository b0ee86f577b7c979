"""Tell which weights are of one kind, so that a step can be done for a stack of them: (weights, rows, columns).

Most weights are changed by one plain LoRA or DoRA, and small ones cost more for calls than for numbers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from ..adapters import Decomposed, LowRank
from ..storage.safetensors import StoredTensor
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
    known = vars(item)
    if _KEPT not in known:
        known[_KEPT] = _kind_of(item)
    kind: StackKind | None = known[_KEPT]
    return kind


def _kind_of(item: Item) -> StackKind | None:
    if len(item.edits) != 1 or item.dtype not in ROUNDED or not _is_plain(item):
        return None
    edit = item.edits[0]
    update = edit.update
    low, m = (update.inner, (update.m,)) if isinstance(update, Decomposed) else (update, ())
    if not isinstance(low, LowRank) or not _is_plain_edit(edit) or not _is_plain_low_rank(low):
        return None
    tensors = (item.source, low.A, low.B, *m)
    if {type(tensor) for tensor in tensors} != {StoredTensor}:  # views and codes
        return None
    return _kind(item.dtype, *[(tensor.dtype, tensor.shape) for tensor in tensors])


@lru_cache(maxsize=1024)
def _kind(dtype: str, *tensors: tuple[str, tuple[int, ...]]) -> StackKind | None:
    """Return the kind of a written dtype, and of the dtypes and shapes of W, A, B and m; None if it is not one."""
    dtypes, (W, A, B, *m) = zip(*tensors, strict=True)
    if not STORED.issuperset(dtypes) or min(map(len, (W, A, B))) < 2 or not math.prod(W):
        return None
    rows, columns = W[0], math.prod(W[1:])
    if (B[0], math.prod(A[1:])) != (rows, columns) or (m and math.prod(m[0]) != rows):
        return None
    return StackKind((rows, columns), A[0], (dtype, *dtypes))


def _is_plain(item: Item) -> bool:
    """Return True if the rows of an item are those of the base, with edits that are added up."""
    odd = item.rows or item.parts or item.undo or item.combination
    return item.source is item.base and not odd and (item.shape is item.source.shape or not item.grown)


def _is_plain_edit(edit: Edit) -> bool:
    """Return True for a whole edit by rows of the weight as it is stored."""
    if edit.transposed or edit.outputs or edit.weight != 1 or edit.follows:
        return False
    update = edit.update
    if not isinstance(update, Decomposed):
        return True
    by_rows = update.axis == "rows" and not update.normalised
    return by_rows and (update.norm_scale is None or edit.norm_ratio == 1)


def _is_plain_low_rank(low: LowRank) -> bool:
    return not (low.start or low.experts or low.d or low.b or low.widest) and low.blocks == (1, 1)
