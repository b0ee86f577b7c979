"""Bound the error of tools that round more often than once."""

from __future__ import annotations

from torch import Tensor

from ..adapters import tensors_of
from ..engine.precision import GRID, half_ulp
from ..plan.item import Edit, Item


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
