"""Describe one output tensor: its inputs, the edits that change it, and its cost in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from ..adapters import Decomposed, Delta, Full, LowRank, Rows, Transform, low_rank, tensors_of, transform_of
from ..option_table import Combination
from ..records import kept, record
from ..storage.reader import block_height, spans
from ..storage.safetensors import BITS, FLOATS, StoredTensor

if TYPE_CHECKING:
    from ..adapters.kinds import Follows
    from .undo_part import Undo

KEPT = 2
"""Whole tensors behind views that a worker keeps: the experts' two take turns."""


@record(frozen=True)
class Edit:
    """A matched update and its weight in the merge."""

    update: Transform | Decomposed | Delta | Follows | Full
    transposed: bool = False
    weight: float = 1.0
    outputs: tuple[int, int] | None = None
    """The outputs of the stored weight that the edit is for, from the first to before the last; None for all.
    Outside of them the edit's factors are zero, and its m/n is one."""
    density: float = 1.0
    """The share of the change that is kept, if changes are combined so."""
    kernel: int = 1
    """The columns of the stored matrix that share a magnitude: a convolution's kernel, for norms of inputs."""
    follows: Item | None = None
    """For a bias that is scaled as its weight is: the weight, with the one edit that sets magnitudes."""

    @kept
    def low(self) -> LowRank | None:
        """The low-rank part; None for other kinds."""
        return low_rank(self.update)

    @kept
    def inner(self) -> Transform | None:
        """The part of the update that makes V of W; None if V is W, or the weight a bias."""
        return transform_of(self.update)

    @kept
    def magnitudes(self) -> Decomposed | None:
        """The update that sets magnitudes: this one, or the one that a bias follows; None for others."""
        if self.follows:
            return self.follows.edits[0].magnitudes
        return self.update if isinstance(self.update, Decomposed) else None

    @property
    def decomposed(self) -> bool:
        """True if the edit multiplies V by magnitudes, divided by norms or not."""
        return self.magnitudes is not None

    @kept
    def divides(self) -> bool:
        """True if the edit divides V by norms."""
        return self.magnitudes is not None and not self.magnitudes.normalised

    @property
    def depends(self) -> bool:
        """True if what the edit adds depends on the weight."""
        return self.decomposed or (self.inner is not None and self.inner.depends)

    @property
    def axis(self) -> int:
        """The axis of the stored matrix that a magnitude's norm runs along; of a bias, the only row's."""
        by_inputs = isinstance(self.update, Decomposed) and self.update.axis == "columns"
        return 0 if self.follows or self.transposed != by_inputs else 1

    @property
    def two_passes(self) -> bool:
        """True if norms need the whole tensor before its first row can be written."""
        return self.divides and self.axis == 0

    @property
    def norm_ratio(self) -> float:
        """The scaling of the addend inside the norm, in scalings of the addend."""
        scale = self.update.norm_scale if isinstance(self.update, Decomposed) and self.inner else None
        return 1.0 if scale is None or not self.inner else scale / self.inner.scale

    @property
    def norm_count(self) -> int:
        """The number of norms, one for each row or column of the stored matrix that the edit scales."""
        return self.magnitudes.m.numel * self.kernel if self.magnitudes and self.divides else 0

    @property
    def by_columns(self) -> bool:
        """True if outputs are columns of the stored matrix: a bias is one row."""
        return self.transposed or self.follows is not None or isinstance(self.update, Delta)

    def own_rows(self, start: int, stop: int) -> tuple[int, int]:
        """Return the rows of a block that the edit changes; they are none if both numbers are equal."""
        if not self.outputs or self.by_columns:
            return start, stop
        first, last = self.outputs
        low = min(max(start, first), stop)
        return low, max(low, min(stop, last))


@record(frozen=True)
class Item:
    """One output tensor and its inputs."""

    block_elements: ClassVar[int] = 0  # the usual number
    name: str
    dtype: str
    shape: tuple[int, ...]
    source: StoredTensor
    """The tensor whose values the edits change: the base's, or the adapter's that replaces the base's."""
    base: StoredTensor | None
    """The base's tensor that this one replaces or derives from; None if the base has none."""
    rows: tuple[Rows, ...] = ()
    edits: tuple[Edit, ...] = ()
    added: bool = False
    """True if the base has no such tensor, or fewer copies."""
    origin: str = ""
    """The name on disk of the base's tensor that this one derives from."""
    combination: Combination | None = None
    """If set, the edits are more than a sum: a chain, or changes that are pruned, drawn or elected."""
    undo: Undo | None = None
    """If set, `source` is a merge's output, and `edits` and `rows` are the merge's changes."""
    parts: tuple[tuple[str, Item], ...] = ()
    """If set, the result is coded again: this item has the codes, and these have the other parts, by role."""
    part_of: str = ""
    """The name of the item that writes this one along with itself."""

    @kept
    def matrix(self) -> tuple[int, int]:
        """`source` as a matrix: (rows, columns)."""
        return self.source.matrix

    @kept
    def grown(self) -> int:
        """The number of output rows below those of `source`; `rows` holds all of them."""
        as_source = self.shape is self.source.shape or self.undo or self.parts
        return 0 if as_source else max(0, sum(self.shape[:1]) - sum(self.source.shape[:1]))

    @property
    def stacked(self) -> tuple[int, ...]:
        """The output's shape as it is computed: experts lie one below the other."""
        return self.shape if self.grown else self.source.shape

    @property
    def extends(self) -> bool:
        """True if the output is the base's tensor with new rows below."""
        first = min((row for rows in self.rows for row in rows.index), default=0) if self.rows else 0
        return bool(self.grown) and self.source is self.base and first >= self.matrix[0]

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def replaced(self) -> bool:
        """True if values come from the adapter as they are: all of them, or some rows."""
        return not self.undo and (self.source is not self.base or bool(self.rows))

    @property
    def verbatim(self) -> bool:
        """True if the output's bytes are on disk: the base's, or an adapter's counters and the like."""
        if self.edits or self.undo or self.part_of or self.dtype != self.source.dtype or self.source.coded:
            return False
        return not self.replaced or self.source.dtype not in FLOATS

    @property
    def fate(self) -> str:
        """One word for reports: added, merged, replaced, converted or copied."""
        if self.added:
            return "added"
        if self.edits or self.part_of:
            return "merged"
        copied = "copied" if self.verbatim else "converted"
        return "replaced" if self.replaced or (self.undo and self.undo.kept) else copied

    @property
    def changed(self) -> bool:
        """True if an adapter changes the tensor."""
        return bool(self.edits) or self.replaced

    @property
    def noted(self) -> bool:
        """True if receipts list the tensor: the base does not have the same tensor under the same name."""
        return self.changed or self.added or self.origin != self.name or not self.verbatim

    @kept
    def start(self) -> LowRank | None:
        """The update whose training began with other base weights than those on disk."""
        return next((edit.low for edit in self.edits if edit.low and edit.low.start), None)

    @kept
    def experts(self) -> int:
        """The number of matrices that lie one below the other in `source`, each with its own factors."""
        return max((edit.low.experts for edit in self.edits if edit.low), default=0) or 1

    @property
    def together(self) -> Iterator[Item]:
        """The items that are written together: this one, and the other parts of a coded weight."""
        yield self
        yield from (part for _, part in self.parts)

    @property
    def factors(self) -> Iterator[StoredTensor]:
        """The adapters' tensors that the edits need."""
        return (tensor for edit in self.edits for tensor in tensors_of(edit.update))

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the blocks of rows; no block holds rows of two experts."""
        return spans(*self.matrix, self.experts, elements=self.block_elements)

    def cost(self, width: int, *, exact: bool = False) -> int:
        """Return the bytes that a worker holds: a block's buffers and factors, at `width` bytes an element.

        A copy needs no buffer worth counting. With `exact`, the base is also predicted from the output.
        """
        if self.verbatim:
            return 0
        if self.undo:
            return self.inverse_cost()
        rows, columns = self.matrix
        height = block_height(max(rows // self.experts, self.grown), columns, elements=self.block_elements)
        block = height * columns
        host = block * max(self.source.itemsize, BITS[self.dtype] // 8, self.base.itemsize if self.base else 0)
        total = host + block * (width + 4) + (host + 8 * block if self.replaced else 0)
        total += self.source.held(block, again=bool(self.parts))
        if self.combination:
            rank, whole = sum(edit.low.rank for edit in self.edits if edit.low), self.block_elements > 0
            total += self.combination.cost(len(self.edits), self.matrix, block, width, rank=rank, whole=whole)
        elif len(self.edits) > 1:
            total += 2 * block * width
        if self.start:
            total += 24 * rows * columns  # the matrix, its factors, and LAPACK's work, in float32
        if exact and self.source is self.base:
            total += self.inverse_cost()
        return total + sum(edit_cost(edit, self, height, width) for edit in self.edits)

    @property
    def invertible(self) -> bool:
        """True if equations recover the base from the output: those of a sum, and those of a chain, link by link."""
        single = len(self.edits) == 1 and self.edits[0].weight == 1
        is_sum = self.combination is None or self.combination.method == "chain"
        return is_sum and (single or not any(edit.inner and edit.inner.depends for edit in self.edits))

    def inverse_cost(self) -> int:
        """Return the bytes that a worker holds to take the edits out of a block, in float64."""
        rows, columns = self.matrix
        height = block_height(rows // self.experts, columns, elements=self.block_elements)
        wide = self.base.itemsize if self.base else 8
        counting = 40 if self.undo and not self.undo.ulps else 0  # for the differences of rounding
        block = height * columns * (self.source.itemsize + 8 + 8 + 4 + 5 * wide + counting)
        factors = sum(2 * edit_cost(edit, self, height, 8) for edit in self.edits)
        return block + factors + (24 * self.start.rank * sum(self.matrix) if self.start else 0)

    def undo_bytes(self, *, exact: bool = False) -> int:
        """Return the most bytes of the undo record: norms, replaced rows, and for `exact` an eighth of the tensor."""
        total = sum(4 * edit.norm_count for edit in self.edits) if self.invertible else 0
        if self.start:
            total += 4 * self.start.rank * sum(self.matrix)
        if self.base and self.replaced and not self.added:
            whole = self.source is not self.base
            kept = self.base.matrix[0] if whole else sum(len(rows.index) for rows in self.rows)
            total += kept * (self.base.nbytes // max(1, self.base.matrix[0]) + 8)
        if exact and self.base and not self.verbatim and self.source is self.base:
            few = self.invertible and BITS[self.dtype] >= BITS[self.base.dtype]
            total += self.base.nbytes // 8 if few else self.base.nbytes
        return total


def are_apart(edits: Sequence[Edit]) -> bool:
    """Return True if no two edits are for the same output of the stored weight."""
    parts = sorted(edit.outputs for edit in edits if edit.outputs)
    return len(edits) < 2 or (len(parts) == len(edits) and all(one[1] <= other[0] for one, other in pairwise(parts)))


def edit_cost(edit: Edit, item: Item, height: int, width: int) -> int:
    """Return the bytes held for one edit of an item: one whole factor, a block's rows of the other factor, norms."""
    kept = KEPT * max((tensor.kept for tensor in tensors_of(edit.update)), default=0)
    if not (low := edit.low):
        if isinstance(edit.update, Delta):
            return kept + edit.update.value.numel * (width + 4)
        from .costs import transform_cost

        kept += edit.follows.cost(width) if edit.follows else 0  # the weight's norms are computed first
        return kept + transform_cost(edit.inner, item.matrix, height, width, transposed=edit.transposed)
    inputs = math.prod(low.inputs)
    if low.experts:
        return kept + low.A.nbytes + low.B.nbytes + 2 * width * low.rank * (inputs + low.outputs)
    whole, sliced = (low.outputs, inputs) if edit.transposed else (inputs, low.outputs)
    total = kept + low.rank * (whole * width + min(height, sliced) * (width + low.B.itemsize))
    total += low.rank * whole * width if low.blocks != (1, 1) else 0
    return total + (low.outputs * (3 * width + 4) if edit.decomposed else 0)
