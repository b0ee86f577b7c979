"""Show rows and columns of stored tensors in any order, once the rows behind them are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..storage.safetensors import StoredTensor
from ..storage.stored_view import StoredView


def show(
    tensor: StoredTensor,
    rows: Sequence[int],
    columns: Sequence[int],
    read: Callable[[StoredTensor, Sequence[int]], Tensor],
) -> Tensor:
    """Return some rows and columns of a view's matrix, in memory of their own.

    `read` returns rows of the whole tensor behind the view, which it gets as a matrix.
    """
    assert isinstance(tensor, StoredView)
    lines, elements = tensor.picked(rows, columns)
    part = read(tensor.matrix_behind, lines)
    if elements != range(part.shape[1]):
        part = taken(part, elements, 1)
    return (part.T if tensor.turned or len(tensor.shape) < 2 else part).contiguous()


def taken(x: Tensor, numbers: Sequence[int], axis: int) -> Tensor:
    """Return some rows of a matrix for axis 0, some columns for axis 1."""
    if isinstance(numbers, range) and numbers.step > 0:
        chosen = slice(numbers.start, numbers.stop, numbers.step)
        return x[chosen] if axis == 0 else x[:, chosen]
    return x.index_select(axis, torch.tensor(numbers, dtype=torch.int64))
