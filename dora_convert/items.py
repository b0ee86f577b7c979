"""One output tensor: what it is made from, what that costs, and how its rows are cut into blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .blocks import block_height, spans
from .stored import BITS, FLOATS, Stored
from .updates import Decomposed, Delta, LowRank, Rows, low_rank


@dataclass(frozen=True)
class Edit:
    """One update in its place, and the strength it is applied at."""

    update: LowRank | Decomposed | Delta
    transposed: bool = False
    weight: float = 1.0

    @property
    def decomposed(self) -> bool:
        """Whether it sets magnitudes."""
        return isinstance(self.update, Decomposed)

    @property
    def axis(self) -> int:
        """The axis of the stored matrix that a magnitude's norm runs along."""
        return 0 if self.transposed else 1

    @property
    def two_passes(self) -> bool:
        """Whether norms need the whole tensor before its first row can be written."""
        return self.decomposed and self.axis == 0

    @property
    def low(self) -> LowRank | None:
        """The low-rank part; a bias's delta has none."""
        return None if isinstance(self.update, Delta) else low_rank(self.update)


@dataclass(frozen=True)
class Item:
    """One output tensor and what it is made from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Stored
    """Where the values start: a tensor of the base, or the adapter's that takes its place."""
    base: Stored | None
    """The base's tensor that it takes the place of or derives from; None where the base has none."""
    rows: tuple[Rows, ...] = ()
    edits: tuple[Edit, ...] = ()
    added: bool = False
    """Whether the base has no such tensor, or one less of it."""
    origin: str = ""
    """What the base calls the tensor on disk that it derives from."""

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def replaced(self) -> bool:
        """Whether values come from the adapter as they are: all of them, or some rows."""
        return self.source is not self.base or bool(self.rows)

    @property
    def verbatim(self) -> bool:
        """Whether bytes on disk are the output's: the base's, or counters and the like that an adapter brings."""
        copied = not self.replaced or self.source.dtype not in FLOATS
        return not self.edits and copied and self.dtype == self.source.dtype

    @property
    def fate(self) -> str:
        """What happens to the tensor: added, merged, replaced, converted or copied."""
        if self.added:
            return "added"
        if self.edits:
            return "merged"
        if self.replaced:
            return "replaced"
        return "copied" if self.verbatim else "converted"

    @property
    def changed(self) -> bool:
        """Whether an adapter has a part in it."""
        return bool(self.edits) or self.replaced

    @cached_property
    def low_ranks(self) -> tuple[LowRank, ...]:
        """The low-rank part of every edit that has one."""
        return tuple(edit.low for edit in self.edits if edit.low)

    @property
    def start(self) -> LowRank | None:
        """The update whose training began with other base weights than those on disk."""
        return next((low for low in self.low_ranks if low.start), None)

    @property
    def experts(self) -> int:
        """How many matrices lie one below the other in `source`, each with its own factors."""
        return max((low.experts for low in self.low_ranks), default=0) or 1

    def spans(self) -> Iterator[tuple[int, int]]:
        """The blocks of rows that it is made in; none holds rows of two experts."""
        rows, columns = self.source.matrix
        return spans(rows, columns, self.experts)

    def cost(self, width: int) -> int:
        """Bytes a worker holds to make it, with so many bytes an element: a block's buffers, and the factors.

        Copies need no buffer worth counting.
        """
        if self.verbatim:
            return 0
        rows, columns = self.source.matrix
        height = block_height(rows // self.experts, columns)
        block = height * columns
        host = block * max(
            self.source.itemsize, BITS[self.dtype] // 8, self.base.itemsize if self.base else 0
        )
        total = host + block * (width + 4) + (host + 8 * block if self.replaced else 0)
        if len(self.edits) > 1:
            total += 2 * block * width
        if self.start:
            total += 24 * rows * columns  # the matrix, its factors, and LAPACK's work, in float32
        return total + sum(edit_cost(edit, height, width) for edit in self.edits)

    def undo_bytes(self) -> int:
        """The most that undoing it can need: a norm per DoRA row, the base's rows where it was replaced."""
        norms = sum(4 * edit.low.outputs for edit in self.edits if edit.low and edit.decomposed)
        if not (self.base and self.replaced and not self.added):
            return norms
        kept = self.base.matrix[0] if self.source is not self.base else sum(len(r.index) for r in self.rows)
        return norms + kept * (self.base.nbytes // max(1, self.base.matrix[0]) + 8)


def edit_cost(edit: Edit, height: int, width: int) -> int:
    """Bytes held for one edit: the factor on the side of the columns, a block's rows of the other, norms."""
    if not (low := edit.low):
        return edit.update.value.numel * (width + 4) if isinstance(edit.update, Delta) else 0
    inputs = math.prod(low.inputs)
    if low.experts:
        return low.A.nbytes + low.B.nbytes + 2 * width * low.rank * (inputs + low.outputs)
    whole, sliced = (low.outputs, inputs) if edit.transposed else (inputs, low.outputs)
    total = low.rank * (whole * width + min(height, sliced) * (width + low.B.itemsize))
    if low.blocks != (1, 1):
        total += low.rank * whole * width
    return total + (low.outputs * (3 * width + 4) if edit.decomposed else 0)
