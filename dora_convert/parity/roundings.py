"""Bound the error of merges, by this tool and by others, which round more often than once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ..adapters import tensors_of
from ..engine.precision import GRID, half_ulp
from ..plan.item import Edit, Item

EPSILON = 2.0 ** -GRID["F32"][0]


class AnyPart(Protocol):
    """One edit's part in some rows, as `parity.expected` computes it."""

    @property
    def delta(self) -> Tensor: ...  # noqa: D102
    @property
    def f(self) -> Tensor: ...  # noqa: D102
    @property
    def size(self) -> Callable[[], Tensor]: ...  # noqa: D102
    @property
    def terms(self) -> int: ...  # noqa: D102
    @property
    def n(self) -> Tensor | None: ...  # noqa: D102


def bound_of(
    item: Item, W: Tensor, parts: Sequence[AnyPart], x: Tensor, *, start: Tensor | None, rounded_once: bool
) -> Tensor:
    """Return the largest honest distance from x; `start` is the weight that training began with, if not W."""
    tolerance = half_ulp(x, item.dtype) + (math.sqrt(W.shape[1]) + 6) * EPSILON * x.abs()
    for edit, part in zip(item.edits, parts, strict=True):
        slack = (part.terms + 2) * EPSILON * (part.size() + W.abs())
        if not rounded_once:
            slack = slack + half_ulp(part.delta, coarser(edit, item.dtype))
            if part.n is not None:
                extra = several_roundings(item, edit, W, part.delta, f=part.f, n=part.n, x=x)
                tolerance += abs(edit.weight) * extra
        if start is not None:  # rounded before, after products of the whole matrix in float32
            slack = slack + 2 * half_ulp(W, item.source.dtype) + 64 * EPSILON * start.abs().max()
        tolerance += abs(edit.weight) * part.f.abs() * slack
    return tolerance


def coarser(edit: Edit, dtype: str) -> str:
    """Return the dtype that a delta may be rounded to: the weight's, or a coarser one of the adapter's."""
    coarse = [tensor.dtype for tensor in tensors_of(edit.update) if tensor.dtype in ("BF16", "F16")]
    return min([dtype, *coarse], key=lambda name: GRID[name][0])


def several_roundings(item: Item, edit: Edit, W: Tensor, delta: Tensor, *, f: Tensor, n: Tensor, x: Tensor) -> Tensor:
    """Return the further error of a DoRA that was rounded at V, m/n, the delta's norm or the change."""
    dtype = coarser(edit, item.dtype)
    moved = half_ulp(delta, dtype).square().sum(dim=edit.axis, keepdim=True)
    seen, whole = delta.shape[edit.axis], item.source.matrix[edit.axis]
    # only some rows of the columns are at hand
    drift = (moved * (2 * whole / seen if seen < whole else 1)).sqrt() / n
    relative = drift + 3 * 2.0 ** -GRID[dtype][0]
    granted: Tensor = x.abs() * relative + f.abs() * half_ulp(W + delta, dtype)
    return granted + half_ulp(x - W, dtype) + half_ulp(x, dtype)
