"""Count the memory of edits of other kinds than low rank."""

from __future__ import annotations

import math

from ..adapters import LowRank, Transform
from ..adapters.kinds import Computed, Hadamard, Kronecker, Modulated, Sparse, Tucker, shape_of
from ..adapters.rotations import Rotated

COMPLEX = 4
"""Copies of a whole matrix while its Fourier transform is computed."""


def transform_cost(
    inner: Transform | None, matrix: tuple[int, int], height: int, width: int, *, transposed: bool
) -> int:
    """Return the bytes held to change a stored matrix (rows, columns) in blocks of `height` rows."""
    return 4 * width * max(matrix) + (_cost(inner, matrix, height, width, transposed=transposed) if inner else 0)


def _cost(inner: Transform, matrix: tuple[int, int], height: int, width: int, *, transposed: bool) -> int:
    rows, columns = matrix
    block, whole = height * columns * width, rows * columns * width
    stored = sum(tensor.numel for tensor in inner.tensors) * (width + 8)
    match inner:
        case Hadamard() | Modulated():
            has_core = any(len(tensor.shape) > 2 for tensor in inner.tensors)
            return stored + 3 * (whole if has_core else block)
        case Kronecker(one, other):
            return stored + 2 * width * sum(math.prod(shape_of(factor)) for factor in (one, other)) + block
        case Sparse():
            return stored + 3 * inner.values.numel * 8
        case Rotated():
            return 4 * stored + (3 * whole if inner.on_outputs != transposed else 3 * block)
        case Computed(rule):
            return stored + (COMPLEX if rule == "FourierFT" else 2) * whole
        case Tucker() | LowRank():
            return stored + 2 * whole
    return stored // max(1, rows) * height + block
