"""One output tensor: what it is made from, what that costs, and how its rows are cut into blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..adapters.updates import Decomposed, Delta, LowRank, Rows, low_rank
from ..storage.safetensors import BITS, FLOATS, StoredTensor
from .blocks import block_height, spans


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
class Undo:
    """What an undo record holds of one tensor: with it, the edits are taken out again instead of applied."""

    norms: tuple[StoredTensor | None, ...] = ()
    """For each edit, ‖W + sBA‖ as it was; None where it sets no magnitudes."""
    taken: tuple[StoredTensor, StoredTensor] | None = None
    """What training began without, as (rows, r) and (r, columns)."""
    kept: tuple[StoredTensor, StoredTensor] | None = None
    """The base's rows that were replaced, and which they are."""
    ulps: StoredTensor | None = None
    """What rounding lost, packed."""
    original: StoredTensor | None = None
    """The base's own tensor, where norms must be taken from it."""

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All of them that are there."""
        found = (*self.norms, *(self.taken or ()), *(self.kept or ()), self.ulps, self.original)
        return tuple(stored for stored in found if stored)


@dataclass(frozen=True)
class Item:
    """One output tensor and what it is made from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: StoredTensor
    """Where the values start: a tensor of the base, or the adapter's that takes its place."""
    base: StoredTensor | None
    """The base's tensor that it takes the place of or derives from; None where the base has none."""
    rows: tuple[Rows, ...] = ()
    edits: tuple[Edit, ...] = ()
    added: bool = False
    """Whether the base has no such tensor, or one less of it."""
    origin: str = ""
    """What the base calls the tensor on disk that it derives from."""
    undo: Undo | None = None
    """Where set, `source` is merged, or what replaced the base's; `edits` and `rows` are what was done to it."""

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def replaced(self) -> bool:
        """Whether values come from the adapter as they are: all of them, or some rows."""
        return not self.undo and (self.source is not self.base or bool(self.rows))

    @property
    def verbatim(self) -> bool:
        """Whether bytes on disk are the output's: the base's, or counters and the like that an adapter brings."""
        copied = not self.replaced or self.source.dtype not in FLOATS
        return not self.edits and copied and self.dtype == self.source.dtype and not self.undo

    @property
    def fate(self) -> str:
        """What happens to the tensor: added, merged, replaced, converted or copied."""
        if self.added:
            return "added"
        if self.edits:
            return "merged"
        if self.replaced or (self.undo and self.undo.kept):
            return "replaced"
        return "copied" if self.verbatim else "converted"

    @property
    def changed(self) -> bool:
        """Whether an adapter has a part in it."""
        return bool(self.edits) or self.replaced

    @property
    def noted(self) -> bool:
        """Whether the base does not have the tensor as it is, under the same name: receipts list those."""
        return self.changed or self.added or self.origin != self.name or not self.verbatim

    @property
    def beyond_recovery(self) -> bool:
        """Whether it is copied from the adapter as bytes, as counters are: nothing is compared with the base's then."""
        return self.base is not None and self.replaced and self.verbatim

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

    def base_spans(self) -> Iterator[tuple[int, int]]:
        """Yield the blocks of rows of the base's tensor."""
        return spans(*self.base.matrix) if self.base else iter(())

    def cost(self, width: int, *, exact: bool = False) -> int:
        """Bytes a worker holds to make it, with so many bytes an element: a block's buffers, and the factors.

        Copies need no buffer worth counting. `exact`: the base is predicted from what is written, too.
        """
        if self.verbatim:
            return 0
        if self.undo:
            return self.inverse_cost()
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
        if exact and self.source is self.base:
            total += self.inverse_cost()
        return total + sum(edit_cost(edit, height, width) for edit in self.edits)

    def inverse_cost(self) -> int:
        """Bytes held to take the edits out of a block again, in float64."""
        rows, columns = self.source.matrix
        height = block_height(rows // self.experts, columns)
        wide = self.base.itemsize if self.base else 8
        counting = 40 if self.undo and not self.undo.ulps else 0  # what may have been lost
        block = height * columns * (self.source.itemsize + 8 + 8 + 4 + 5 * wide + counting)
        factors = sum(2 * edit_cost(edit, height, 8) for edit in self.edits)
        return block + factors + (24 * self.start.rank * (rows + columns) if self.start else 0)

    def undo_bytes(self, *, exact: bool = False) -> int:
        """What undoing it may need: norms of DoRA rows, the base's rows where it was replaced, an eighth for `exact`."""
        total = sum(4 * edit.low.outputs for edit in self.edits if edit.low and edit.decomposed)
        if self.start:
            total += 4 * self.start.rank * sum(self.source.matrix)
        if self.base and self.replaced and not self.added:
            whole = self.source is not self.base
            kept = self.base.matrix[0] if whole else sum(len(rows.index) for rows in self.rows)
            total += kept * (self.base.nbytes // max(1, self.base.matrix[0]) + 8)
        if exact and self.base and not self.verbatim and self.source is self.base:
            total += self.base.nbytes // 8 if BITS[self.dtype] >= BITS[self.base.dtype] else self.base.nbytes
        return total


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
