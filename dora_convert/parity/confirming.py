"""Confirm blocks of a weight that one plain LoRA or DoRA changes: each element is the float64 result, rounded once.

A few steps over whole blocks tell this, in memory that every block reuses. They do not tell which element is off, or
how far. A block that is not confirmed is left to `parity.tensor`, which counts and measures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import Decomposed
from ..engine.precision import TORCH
from ..plan.item import Item
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .stack_facts import least_room

PATIENCE = 2
"""Blocks in a row that are tried in vain before a weight is left to the slow way: other tools round more than once."""


class Confirmation:
    """One plain weight of a merge, whose blocks of rows are confirmed one after the other."""

    def __init__(self, item: Item, written: StoredTensor, reader: Reader, x: Tensor) -> None:
        """`x` are sample inputs: (in, samples), perhaps none of them."""
        edit, (rows, columns) = item.edits[0], item.matrix
        low, update = edit.low, edit.update
        assert low
        self._base, self._left, self._written, self._reader = item.source, low.B, written, reader
        self._blocks, self._raw = torch.empty(3, 0, columns, dtype=torch.float64), bytearray()
        self._right = self._doubles(low.A, range(low.rank)).mul_(low.scale)  # (r, in), s·A
        self._m: Tensor | None = None
        if isinstance(update, Decomposed):
            self._m = self._doubles(update.m, range(update.m.matrix[0])).flatten().add_(update.offset)
        self._x = x[:columns].T.contiguous()  # (samples, in)
        self._inner = self._x @ self._right.T  # (samples, r), s·Ax
        self.outputs = torch.zeros(2, len(self._x), rows, dtype=torch.float64)
        """W'x as written, and by the adapter's own forward: (2, samples, out); zero for rows that are not confirmed."""
        self._patience = PATIENCE

    def confirms(self, rows: range) -> bool:
        """Return True if every element of some rows is the value nearest to its result; False decides nothing."""
        if not self._patience:
            return False
        if len(rows) > self._blocks.shape[1]:
            self._blocks = self._blocks.new_empty(3, len(rows), self._blocks.shape[2])
        W, got, spare = self._blocks[:, : len(rows)]
        x, y = self._result(W.copy_(self._rows(self._base, rows)), rows)
        written = self._rows(self._written, rows)
        got.copy_(written)
        outputs = torch.stack([self._x @ got.T, y])
        right = are_nearest(got, x, written, spare)
        if right:
            self.outputs[:, :, rows.start : rows.stop] = outputs
        self._patience = PATIENCE if right else self._patience - 1
        return right

    def _result(self, W: Tensor, rows: range) -> tuple[Tensor, Tensor]:
        """Return W + s·BA of some rows, or m times it over its norm, in W's place; and its outputs, without BA."""
        left = self._doubles(self._left, rows)
        y = torch.addmm(self._x @ W.T, self._inner, left.T)
        V = W.addmm_(left, self._right)
        if self._m is None:
            return V, y
        f = self._m[rows.start : rows.stop] / torch.linalg.vecdot(V, V).sqrt_()
        return V.mul_(f.unsqueeze(1)), y.mul_(f)

    def _doubles(self, tensor: StoredTensor, rows: range) -> Tensor:
        """Read neighbouring rows, in float64 and in memory of their own."""
        return self._rows(tensor, rows).to(torch.float64, copy=True)

    def _rows(self, tensor: StoredTensor, rows: range) -> Tensor:
        """Read neighbouring rows, in the stored dtype, into memory that the next call overwrites."""
        line = tensor.matrix[1] * tensor.itemsize
        if (nbytes := len(rows) * line) > len(self._raw):
            self._raw = bytearray(nbytes)
        self._reader.read(tensor.path, tensor.start + rows.start * line, memoryview(self._raw)[:nbytes])
        return torch.frombuffer(self._raw, dtype=TORCH[tensor.dtype], count=nbytes // tensor.itemsize).view(
            len(rows), -1
        )


def are_nearest(got: Tensor, x: Tensor, written: Tensor, spare: Tensor) -> bool:
    """Return True if every number is the value nearest to x, ties to even; NaN is not. Overwrites all but `written`.

    `got` are the written numbers in float64.
    """
    off, x, written, spare = (each.unsqueeze(0) for each in (got.sub_(x).abs_(), x, written, spare))
    return any(least_room(off, x, written, out=spare, quick=quick).item() > 0 for quick in (True, False))
