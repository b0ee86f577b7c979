"""Load the tensors of an edit, and apply the edit to any block of the stored weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..adapters import Delta, LowRank
from ..maths import lora as maths
from ..plan.item import Edit, are_apart
from .device_buffers import FACTOR_ELEMENTS, DeviceBuffers

if TYPE_CHECKING:
    from .kinds import LoadedTransform


class FactorPair:
    """The factors of V = W + s·left·right, held whole, for any block of rows of the stored weight."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right

    def left(self, start: int, stop: int) -> Tensor:
        """Return rows of the factor that has the weight's rows: (stop − start, r)."""
        return self._left[start:stop]

    def hold(self, start: int, stop: int) -> None:
        """Keep rows of the left factor, which are asked for in pieces; all rows are held here."""

    def right(self, start: int) -> Tensor:  # noqa: ARG002 - the same for all rows
        """Return the factor with the weight's columns, (r, columns), for a block that begins at `start`."""
        return self._right


class FixedPoint(NamedTuple):
    """Fixed-point units for two factors, so coarse that the product of any of their blocks is exact."""

    left: float
    """The largest magnitude in the left factor."""
    right: float
    """The largest magnitude in the right factor."""
    rank: int

    def left_(self, x: Tensor) -> Tensor:
        """Round part of the left factor, in place."""
        return maths.to_fixed_(x, self.left, self.rank)

    def right_(self, x: Tensor) -> Tensor:
        """Round part of the right factor, in place."""
        return maths.to_fixed_(x, self.right, self.rank)


class StreamedFactors(FactorPair):
    """Factors of one weight: the right one is held, the left one is read with each block."""

    def __init__(
        self, low: LowRank, buffers: DeviceBuffers, *, transposed: bool, fixed: FixedPoint | None = None
    ) -> None:
        self._low, self._buffers, self._transposed, self._fixed = low, buffers, transposed, fixed
        held, blocks = (low.B, low.blocks[1]) if transposed else (low.A, low.blocks[0])
        right = maths.block_diagonal(buffers.whole(held), blocks, 0)
        if low.d:  # diag(d) may stand on either side of the product
            right = right * buffers.whole(low.d).view((1, -1) if transposed else (-1, 1))
        self._b = buffers.whole(low.b).view(-1, 1) if low.b else None
        self._all_left: Tensor | None = None  # all rows, where they stay on the device
        if self._b is not None and transposed:
            right = right * self._b
        self._right = right.T if transposed else right
        if fixed:
            fixed.right_(self._right)
        self._held, self._first_held = self._right.new_empty(0, 0), 0
        """Rows of the left factor that are kept, and the number of the first."""

    def left(self, start: int, stop: int) -> Tensor:
        """Read rows of the left factor: (stop − start, r); all rows at once, if it stays on the device."""
        if self._all_left is not None:
            return self._all_left[start:stop]
        if self._buffers.staged:
            rows = math.prod(self._low.inputs) if self._transposed else self._low.outputs
            self._all_left = self._fixed_left(0, rows)
            return self._all_left[start:stop]
        if self._holds(start, stop):
            return self._held[start - self._first_held : stop - self._first_held]
        return self._fixed_left(start, stop)

    def _holds(self, start: int, stop: int) -> bool:
        return self._first_held <= start and stop <= self._first_held + len(self._held)

    def hold(self, start: int, stop: int) -> None:
        """Keep rows of the left factor, which are asked for in pieces or again; all rows, if they are few."""
        if self._buffers.staged or self._holds(start, stop):
            return
        rows = math.prod(self._low.inputs) if self._transposed else self._low.outputs
        first, last = (0, rows) if rows * self._low.rank <= FACTOR_ELEMENTS else (start, stop)
        self._held, self._first_held = self._fixed_left(first, last), first

    def _fixed_left(self, start: int, stop: int) -> Tensor:
        part = self._read_left(start, stop)
        return self._fixed.left_(part) if self._fixed else part

    def _read_left(self, start: int, stop: int) -> Tensor:
        low = self._low
        if self._transposed:
            if low.blocks[0] > 1:
                return maths.block_diagonal(self._buffers.whole(low.A), low.blocks[0], 0)[:, start:stop].T
            return self._buffers.columns(low.A, start, stop).T
        part = self._buffers.rows(low.B, start, stop)
        left = maths.block_diagonal(part, low.blocks[1], start, low.outputs)
        return left if self._b is None else left * self._b[start:stop]


class ExpertFactors(FactorPair):
    """Factors of experts that lie one below the other: held as stored, and cut expert by expert."""

    def __init__(
        self, low: LowRank, buffers: DeviceBuffers, *, transposed: bool, fixed: FixedPoint | None = None
    ) -> None:
        self._buffers, self._transposed, self._fixed = buffers, transposed, fixed
        self._height = low.inputs[0] if transposed else low.outputs
        self._A = buffers.stored(low.A).view(low.experts, low.rank, -1)  # one expert after another
        self._B = buffers.stored(low.B).view(low.outputs, low.rank, low.experts)  # the expert varies fastest
        self._expert = -1
        self._pair = (self._A, self._B)

    def _of(self, start: int) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of the expert that a row belongs to."""
        if self._expert != (expert := start // self._height):
            self._expert = expert
            A, B = self._pair = (self._buffers.computed(self._A[expert]), self._buffers.computed(self._B[:, :, expert]))
            if self._fixed:
                self._fixed.left_(A if self._transposed else B)
                self._fixed.right_(B if self._transposed else A)
        return self._pair

    def right(self, start: int) -> Tensor:
        """Return the right factor of the expert at `start`: (r, columns)."""
        A, B = self._of(start)
        return B.T if self._transposed else A

    def left(self, start: int, stop: int) -> Tensor:
        """Return rows of the left factor of the expert at `start`: (stop − start, r)."""
        A, B = self._of(start)
        first = start % self._height
        return (A.T if self._transposed else B)[first : first + stop - start]


@dataclass
class LoadedEdit:
    """One edit with its tensors, ready for any block of the stored weight."""

    edit: Edit
    factors: FactorPair | None = None
    transform: LoadedTransform | None = None
    """An update of another kind than low rank."""
    shift: Tensor | None = None
    """The addend of a bias, (1, n)."""
    m: Tensor | None = None
    """The magnitudes of a DoRA."""
    n: list[Tensor] = field(default_factory=list)
    """The norms of a DoRA's own outputs: one tensor per block, or one for all blocks if they run along the columns."""
    known: Tensor | None = None
    """The norms of all rows, if an earlier pass has computed them."""

    @classmethod
    def load(cls, edit: Edit, buffers: DeviceBuffers, fixed: FixedPoint | None = None) -> LoadedEdit:
        """Read the tensors that every block needs; factors are rounded to `fixed` if given."""
        if isinstance(edit.update, Delta):
            return cls(edit, shift=buffers.whole(edit.update.value))
        m = _load_magnitudes(edit, buffers) if edit.magnitudes else None
        if low := edit.low:
            kind = ExpertFactors if low.experts else StreamedFactors
            return cls(edit, kind(low, buffers, transposed=edit.transposed, fixed=fixed), m=m)
        if not edit.inner:
            return cls(edit, m=m)
        from .kinds import load_transform

        load = partial(StreamedFactors, buffers=buffers, transposed=edit.transposed)
        return cls(edit, transform=load_transform(edit.inner, buffers, load, transposed=edit.transposed), m=m)

    def is_finite(self) -> bool:
        """Return True if the last norms are finite: a division by an infinite norm hides an overflow."""
        return not self.n or maths.all_finite(self.n[-1])

    def own(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return the part of a block that the edit changes, as a view of the block."""
        if not (outputs := self.edit.outputs):
            return x
        if self.edit.by_columns:
            return x[:, outputs[0] : outputs[1]]
        first, last = self.edit.own_rows(start, stop)
        return x[first - start : last - start]

    def numbers(self, start: int, stop: int) -> tuple[int, int]:
        """Return the rows of a block that the edit changes, counted from the edit's first row."""
        first, last = self.edit.own_rows(start, stop)
        before = self.edit.outputs[0] if self.edit.outputs and not self.edit.by_columns else 0
        return first - before, last - before

    def add_(self, W: Tensor, start: int, stop: int, weight: float = 1.0) -> Tensor:
        """Compute W + w·s·BA in place; for a bias W + w·s·b."""
        own, (first, last) = self.own(W, start, stop), self.numbers(start, stop)
        if self.shift is not None and isinstance(self.edit.update, Delta):
            own.add_(self.shift, alpha=weight * self.edit.update.scale)
        elif first < last and self.factors:
            assert self.edit.low
            scale = weight * self.edit.low.scale
            maths.add_low_rank_(own, self.factors.left(first, last), self.factors.right(first), scale)
        elif first < last and self.transform:
            self.transform.apply_(own, first, last, weight)
        return W

    def hold(self, spans: Iterable[tuple[int, int]], read: Callable[[int, int], Tensor]) -> None:
        """Show all rows at once to an update that needs them; `read` returns rows before the edit."""
        assert self.transform
        self.transform.hold(torch.cat([self.own(read(*span), *span).clone() for span in spans]))

    def measured(self, W: Tensor, start: int, stop: int) -> Tensor:
        """Return the squares of the norms of a block, which is overwritten: of its rows, or of its part of columns."""
        V = self.own(self.add_(W, start, stop, self.edit.norm_ratio), start, stop)
        squares = maths.norms(V, self.edit.axis).square_()
        if self.edit.kernel > 1:
            squares = squares.view(-1, self.edit.kernel).sum(1).repeat_interleave(self.edit.kernel)
        return squares

    def norms_of_rows(self, W: Tensor, start: int, stop: int) -> Tensor:
        """Compute V in place, and return the norms of its rows, for an edit of all outputs."""
        if self.edit.norm_ratio == 1:
            return maths.norms(self.add_(W, start, stop), axis=1)
        n = self.measured(W.clone(), start, stop).sqrt_()
        self.add_(W, start, stop)
        return n

    def apply_(self, W: Tensor, start: int, stop: int) -> Tensor:
        """Compute V in place, or m·V/‖V‖, or m·V if m is normalised."""
        edit, m = self.edit, self.m
        if m is None:
            return self.add_(W, start, stop)
        other = W.clone() if edit.norm_ratio != 1 and not edit.two_passes else None
        V, (first, last) = self.own(self.add_(W, start, stop), start, stop), self.numbers(start, stop)
        if edit.divides and not edit.two_passes:
            n = maths.norms(V, axis=1) if other is None else self.measured(other, start, stop).sqrt_()
            self.n.append(n)
        m = m[first:last] if edit.axis and last - first < len(m) else m
        if edit.divides:
            maths.rescale_(V, m, self.n[-1], edit.axis)
        else:
            V.mul_(m.unsqueeze(edit.axis))
        return W


def _load_magnitudes(edit: Edit, buffers: DeviceBuffers) -> Tensor:
    """Return one magnitude for each row or column of the stored matrix that the edit scales."""
    assert edit.magnitudes
    m = buffers.whole(edit.magnitudes.m).flatten()
    m = m + edit.magnitudes.offset if edit.magnitudes.offset else m
    return m.repeat_interleave(edit.kernel) if edit.kernel > 1 else m


def apply_edits(
    W: Tensor, operands: Sequence[LoadedEdit], start: int, stop: int, buffers: DeviceBuffers | None = None
) -> Tensor:
    """Compute W + Σ wᵢ·(applyᵢ(W) − W) (4) in place; all norms are of the unmerged W.

    Copies of W are in `buffers`, if given: malloc would keep them in pieces.
    """
    edits = [operand.edit for operand in operands]
    if are_apart(edits) and all(edit.weight == 1 or not edit.depends for edit in edits):
        for operand in operands:
            if operand.edit.depends:
                operand.apply_(W, start, stop)
            else:
                operand.add_(W, start, stop, operand.edit.weight)
        return W
    unmerged = _copied(W, "unmerged", buffers) if any(edit.depends for edit in edits) else W
    for operand in operands:
        if operand.edit.depends:
            changed = operand.apply_(_copied(unmerged, "changed", buffers), start, stop)
            W.add_(changed.sub_(unmerged), alpha=operand.edit.weight)
        else:
            operand.add_(W, start, stop, operand.edit.weight)
    return W


def _copied(W: Tensor, name: str, buffers: DeviceBuffers | None) -> Tensor:
    """Return a copy of a block, in memory that the next block reuses if there are buffers."""
    return buffers.scratch(name, W.shape, W.dtype).copy_(W) if buffers else W.clone()
