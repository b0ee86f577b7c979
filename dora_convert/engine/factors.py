"""An edit with its tensors at hand: what it does to a block of rows, the way round that the weight is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from ..adapters.updates import Decomposed, Delta, LowRank
from ..maths import lora as maths
from ..plan.item import Edit
from .device_buffers import DeviceBuffers


class Factors(Protocol):
    """V = W + s·left·right, for any block of rows of the stored weight."""

    def left(self, start: int, stop: int) -> Tensor:
        """The factor that has the weight's rows: some of them, (rows, r)."""

    def right(self, start: int) -> Tensor:
        """The factor that has the weight's columns, (r, columns), for a block that begins at a row."""


class Grid(NamedTuple):
    """Fixed point for factors: the product of any of their blocks is exact."""

    left: float
    """The largest magnitude in the left factor."""
    right: float
    rank: int

    def left_(self, x: Tensor) -> Tensor:
        """Some of the left factor, in place."""
        return maths.to_fixed_(x, self.left, self.rank)

    def right_(self, x: Tensor) -> Tensor:
        """Some of the right factor, in place."""
        return maths.to_fixed_(x, self.right, self.rank)


class Streamed:
    """Factors of one weight: the right one is held, the left one is read with each block."""

    def __init__(
        self, low: LowRank, buffers: DeviceBuffers, *, transposed: bool, grid: Grid | None = None
    ) -> None:
        self._low, self._buffers, self._transposed, self._grid = low, buffers, transposed, grid
        A_blocks, B_blocks = low.blocks
        whole = low.B if transposed else low.A
        right = maths.block_diagonal(buffers.whole(whole), B_blocks if transposed else A_blocks, 0)
        if low.d:  # diag(d) may stand on either side of the product
            right = (
                right * buffers.whole(low.d).view(1, -1)
                if transposed
                else right * buffers.whole(low.d).view(-1, 1)
            )
        self._right = right.T if transposed else right
        if grid:
            grid.right_(self._right)

    def right(self, start: int) -> Tensor:  # noqa: ARG002 - one for all rows
        """(r, columns)."""
        return self._right

    def left(self, start: int, stop: int) -> Tensor:
        """(stop − start, r)."""
        part = self._part(start, stop)
        return self._grid.left_(part) if self._grid else part

    def _part(self, start: int, stop: int) -> Tensor:
        low = self._low
        if self._transposed:
            if low.blocks[0] > 1:
                return maths.block_diagonal(self._buffers.whole(low.A), low.blocks[0], 0)[:, start:stop].T
            return self._buffers.columns(low.A, start, stop).T
        part = self._buffers.rows(low.B, start, stop)
        return maths.block_diagonal(part, low.blocks[1], start, low.outputs)


class Stacked:
    """Factors of experts that lie one below the other: both are held as stored, and an expert's cut out of them."""

    def __init__(
        self, low: LowRank, buffers: DeviceBuffers, *, transposed: bool, grid: Grid | None = None
    ) -> None:
        self._low, self._buffers, self._transposed, self._grid = low, buffers, transposed, grid
        self._height = low.inputs[0] if transposed else low.outputs
        self._A = buffers.stored(low.A).view(low.experts, low.rank, -1)  # one expert after another
        self._B = buffers.stored(low.B).view(low.outputs, low.rank, low.experts)  # the expert varies fastest
        self._expert = -1
        self._pair = (self._A, self._B)

    def _of(self, start: int) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the expert that a row belongs to."""
        if self._expert != (expert := start // self._height):
            self._expert = expert
            A, B = self._pair = (
                self._buffers.computed(self._A[expert]),
                self._buffers.computed(self._B[:, :, expert]),
            )
            if self._grid:
                self._grid.left_(A if self._transposed else B)
                self._grid.right_(B if self._transposed else A)
        return self._pair

    def right(self, start: int) -> Tensor:
        """(r, columns)."""
        A, B = self._of(start)
        return B.T if self._transposed else A

    def left(self, start: int, stop: int) -> Tensor:
        """(stop − start, r)."""
        A, B = self._of(start)
        first = start % self._height
        return (A.T if self._transposed else B)[first : first + stop - start]


@dataclass
class LoadedEdit:
    """One edit, ready for any block of the stored weight."""

    edit: Edit
    factors: Factors | None = None
    shift: Tensor | None = None
    """What is added to a bias, (1, n)."""
    m: Tensor | None = None
    n: list[Tensor] = field(default_factory=list)
    """Norms: one tensor per block, or one for all blocks where they run along the columns."""

    @classmethod
    def load(cls, edit: Edit, buffers: DeviceBuffers, grid: Grid | None = None) -> LoadedEdit:
        """Read what is needed for every block, in fixed point with a grid."""
        if isinstance(edit.update, Delta):
            return cls(edit, shift=buffers.whole(edit.update.value))
        low = edit.low
        assert low
        kind = Stacked if low.experts else Streamed
        m = buffers.whole(edit.update.m).flatten() if isinstance(edit.update, Decomposed) else None
        return cls(edit, kind(low, buffers, transposed=edit.transposed, grid=grid), m=m)

    def is_finite(self) -> bool:
        """Whether the last norm is; dividing by an infinite one hides what overflowed."""
        return not self.n or maths.all_finite(self.n[-1])

    def add_(self, W: Tensor, start: int, stop: int, weight: float = 1.0) -> Tensor:
        """W + w·s·BA, in place; for a bias W + w·s·b."""
        if self.shift is not None and isinstance(self.edit.update, Delta):
            return W.add_(self.shift, alpha=weight * self.edit.update.scale)
        assert self.factors
        assert self.edit.low
        scale = weight * self.edit.low.scale
        return maths.add_low_rank_(W, self.factors.left(start, stop), self.factors.right(start), scale)

    def decompose_(self, W: Tensor, start: int, stop: int) -> Tensor:
        """m·V/‖V‖, in place."""
        assert self.m is not None
        V = self.add_(W, start, stop)
        if self.edit.two_passes:
            return maths.rescale_(V, self.m, self.n[0], axis=0)
        self.n.append(maths.norms(V, axis=1))
        return maths.rescale_(V, self.m[start:stop], self.n[-1], axis=1)
