"""Predict the base from a merged tensor: the inverse equations, for any block of rows.

If residuals are kept, a merge and its unmerge must predict the same bits, on any device, with any number of
threads, in blocks of any height. So factors are rounded to fixed point, which makes their products exact in
any order. The other operations are elementwise, in float64. The residuals hold the error of the coarse
factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..adapters import Delta
from ..engine.device_buffers import FACTOR_ELEMENTS, DeviceBuffers
from ..engine.factors import FactorPair, FixedPoint, LoadedEdit
from ..maths import lora as maths
from ..plan.item import Edit, Item
from ..storage.safetensors import StoredTensor


class Inverse:
    """W = g·W' − Σ cᵢ·Δᵢ (7) for one item, in float64."""

    def __init__(self, item: Item, buffers: DeviceBuffers, *, exact: bool, taken: tuple[Tensor, Tensor] | None) -> None:
        """Load the edits; `exact` asks for the same bits everywhere.

        `taken` are the factors of the part that training began without.
        """
        self._edits, self._buffers, self._columns = item.edits, buffers, item.matrix[1]
        self._item = item
        self.keeps = exact and not all(edit.low or not edit.inner for edit in item.edits)
        """True if W is predicted to be W': the record then holds the whole difference."""
        self.operands = [
            LoadedEdit.load(edit, buffers, _fixed_point(edit, buffers) if exact else None) for edit in item.edits
        ]
        if taken and exact:
            left, right = taken
            fixed = FixedPoint(float(left.abs().max()), float(right.abs().max()), right.shape[0])
            taken = fixed.left_(left.clone()), fixed.right_(right.clone())
        self._taken = FactorPair(*taken) if taken else None

    def hold(self, read: Callable[[int, int], Tensor], norms: Callable[[int, int], Sequence[Tensor | None]]) -> None:
        """Turn back what needs all rows of W' at once; `read` returns rows, and `norms` the norms for them."""
        for operand in () if self.keeps else self.operands:
            if operand.transform and operand.transform.needs_whole:
                parts = []
                for start, stop in self._item.spans():
                    x, (g, _) = read(start, stop), self.coefficients(norms(start, stop), start, stop)
                    parts.append(operand.own(x if g is None else x.mul_(g), start, stop).clone())
                operand.transform.hold_back(torch.cat(parts))

    def predict_(self, x: Tensor, start: int, stop: int, norms: Sequence[Tensor | None]) -> Tensor:
        """Compute W from W' in place; `norms` are those of the edits' rows in the block, or of all their columns."""
        if self.keeps:
            return x
        g, factors = self.coefficients(norms, start, stop)
        if g is not None:
            x.mul_(g)
        for number, (c, operand) in enumerate(zip(factors, self.operands, strict=True)):
            first, last = operand.numbers(start, stop)
            axis = 1 if operand.edit.by_columns else 0
            if isinstance(c, Tensor) and c.shape[axis] == x.shape[axis]:  # else c is the same for all outputs
                factors[number] = operand.own(c, start, stop)
            if first < last and operand.transform and operand.edit.inner and operand.edit.inner.depends:
                operand.transform.take_back(operand.own(x, start, stop), first, last)
            elif first < last and (operand.edit.inner or operand.shift is not None):
                operand.own(x, start, stop).sub_(self._delta(number, factors[number], first, last))
        if self._taken:
            x.add_(self._product(self._taken, start, stop))
        on_host = x.device.type == "cpu"  # a device is not asked: the answer takes longer than the change
        return x if on_host and maths.all_finite(x) else x.nan_to_num_(0.0, 0.0, 0.0)

    def coefficients(
        self, norms: Sequence[Tensor | None], start: int, stop: int
    ) -> tuple[Tensor | None, list[Tensor | float]]:
        """Return g of a block, None if g is 1, and c of each edit."""
        f = [self._f(number, n, start, stop) for number, n in enumerate(norms)]
        return maths.coefficients(f, [edit.weight for edit in self._edits])

    def _f(self, number: int, n: Tensor | None, start: int, stop: int) -> Tensor | None:
        """Return m/n of one edit, shaped to broadcast over the block; 1 for outputs that the edit is not for."""
        operand, edit = self.operands[number], self._edits[number]
        if (m := operand.m) is None or (n is None and edit.divides):
            return None
        first, last = operand.numbers(start, stop)
        m = m if edit.axis == 0 else m[first:last]
        f = (m if n is None else m / n).unsqueeze(edit.axis)
        if not edit.outputs:
            return f
        every = f.new_ones((1, self._columns) if edit.axis == 0 else (stop - start, 1))
        operand.own(every, start, stop).copy_(f)
        return every

    def _delta(self, number: int, c: Tensor | float, start: int, stop: int) -> Tensor:
        """Return c·sBA of some of an edit's rows, or the edit's addend to a bias."""
        operand, edit = self.operands[number], self._edits[number]
        if isinstance(edit.update, Delta):
            assert operand.shift is not None
            return operand.shift * (c * edit.update.scale)
        if operand.transform:
            zeros = torch.zeros(stop - start, self._columns, dtype=torch.float64, device=self._buffers.spec.device)
            zeros = operand.own(zeros, start, stop) if edit.by_columns else zeros
            return operand.transform.apply_(zeros, start, stop, 1.0).mul_(c)
        assert operand.factors
        assert edit.low
        return self._product(operand.factors, start, stop).mul_(c * edit.low.scale)

    def _product(self, factors: FactorPair, start: int, stop: int) -> Tensor:
        """Compute a block of BA in memory that the next block reuses: malloc would keep it in pieces."""
        left, right = factors.left(start, stop), factors.right(start)
        out = self._buffers.scratch("product", (len(left), right.shape[1]), left.dtype)
        return torch.mm(left, right, out=out)


def _fixed_point(edit: Edit, buffers: DeviceBuffers) -> FixedPoint | None:
    """Return the fixed-point units for the factors of an edit; None for a bias."""
    if not (low := edit.low):
        return None
    right = _largest(low.B if edit.transposed else low.A, buffers)
    if low.d:
        right *= _largest(low.d, buffers)
    left = _largest(low.A if edit.transposed else low.B, buffers)
    if low.b:
        largest = _largest(low.b, buffers)
        left, right = (left, right * largest) if edit.transposed else (left * largest, right)
    return FixedPoint(left, right, low.rank)


def _largest(stored: StoredTensor, buffers: DeviceBuffers) -> float:
    """Return the largest magnitude of a stored tensor."""
    rows, columns = stored.matrix
    height, largest = max(1, FACTOR_ELEMENTS // max(1, columns)), 0.0
    for start in range(0, rows, height):
        part = buffers.raw(stored, start, min(rows, start + height), "factor")
        largest = max(largest, float(part.double().abs().max()) if part.numel() else 0.0)
    return largest


def as_rows(n: Tensor, start: int, stop: int, operand: LoadedEdit) -> Tensor:
    """Return the norms that a block needs of one edit's: those of the block's rows, or of all columns."""
    return n if operand.edit.axis == 0 else n[slice(*operand.numbers(start, stop))]


def recorded(n: Tensor) -> Tensor:
    """Round norms as the record holds them, and return them in float64."""
    return n.to(torch.float32).to(torch.float64)
