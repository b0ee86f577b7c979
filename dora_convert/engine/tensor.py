"""Compute one output tensor: read a block of rows, transform it, write it to its shard.

`MergeMaker` is the transformation of a merge: apply the edits, then round once. Other transformations, such
as taking the edits out again, are `TensorMaker`s of other rooms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..maths import lora as maths
from ..output.finished import TensorResult
from ..output.shards import ShardFiles
from ..plan.item import Item
from ..storage.reader import Digest, spans
from ..storage.safetensors import BITS
from ..storage.spool import Spool
from .device_buffers import Begun, DeviceBuffers
from .factors import LoadedEdit, apply_edits
from .precision import TORCH, as_bytes

if TYPE_CHECKING:
    from .protocols import Observe, TensorMaker


def write_item(
    item: Item, maker: TensorMaker, buffers: DeviceBuffers, shards: ShardFiles, advance: Callable[[int], None]
) -> dict[str, TensorResult]:
    """Write one item, and the further parts of a weight that is coded again; return the facts by name."""
    if item.parts:
        from .recoding import write_coded

        assert isinstance(maker, MergeMaker)
        return write_coded(item, maker, buffers, shards, advance)
    return {item.name: write_tensor(item, maker, buffers, shards, advance)}


def write_tensor(
    item: Item, maker: TensorMaker, buffers: DeviceBuffers, shards: ShardFiles, advance: Callable[[int], None]
) -> TensorResult:
    """Write one tensor that is not a plain copy; `advance` is called with the bytes of each block.

    Raises NumericalError if a result is NaN, Inf, or too large for the output's dtype.
    """
    digest, row_bytes = Digest(proof=maker.proves_output), item.source.matrix[1] * BITS[item.dtype] // 8

    def write(start: int, data: memoryview) -> None:
        digest.update(data)
        shards.write(item, start * row_bytes, data)
        advance(len(data))

    if buffers.staged:
        from .staging import finished_blocks

        with closing(finished_blocks(item, maker, buffers)) as blocks:
            for start, block in blocks:
                write(start, as_bytes(block))
    else:
        place = "work" if item.source.coded and isinstance(maker, MergeMaker) else "in"
        for start, stop in item.spans():
            write(start, as_bytes(maker.block(buffers.raw(item.source, start, stop, place), start, stop)))
    for start, data in maker.rest():
        write(start, data)
    return maker.result(digest)


class EditCombiner(Protocol):
    """Applies edits in another way than by adding their changes up."""

    edits: Sequence[LoadedEdit]
    cuts: tuple[tuple[float, int], ...]
    """For each pruned change, the least magnitude kept, and the flat place of the last kept one that equals it."""

    def apply(self, W: Tensor, start: int, stop: int) -> Tensor:
        """Compute the result of all edits for a block of rows, in place."""

    def rounded(self, raw: Tensor, start: int, stop: int) -> Tensor | None:
        """Return the rounded result of a block, from the base's rows; None if `apply` must compute it."""


Combine = Callable[[Item, DeviceBuffers, "SourceValues"], EditCombiner]
"""Loads the edits of one item, and finds what needs the whole tensor."""


class MergeMaker:
    """Applies all edits to the base's tensor, or to the adapter's tensor that replaces it."""

    proves_output = False

    def __init__(
        self,
        item: Item,
        buffers: DeviceBuffers,
        spool: Spool,
        *,
        prove: bool = False,
        observe: Observe | None = None,
        combine: Combine | None = None,
    ) -> None:
        """Load the edits; `prove` asks for the sha256 of the base's bytes, too.

        `combine` is for items whose edits are not added up.
        """
        if not any(tensor.kept for tensor in item.factors):
            buffers.forget()
        self._item, self._buffers = item, buffers
        self.values = SourceValues(item, buffers)
        self._combiner = combine(item, buffers, self.values) if combine and item.combination else None
        self.edits: Sequence[LoadedEdit] = self._combiner.edits if self._combiner else load_edits(item, buffers)
        if not self._combiner:
            measure(item, self.edits, self.values, buffers)
        self._base = Digest(proof=prove)
        self._observer = observe(item, self.edits, self.values.taken, buffers, spool) if observe else None

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Return rows of the output from those of the source."""
        return self.finish(self.begin(raw, start, stop))

    def begin(self, raw: Tensor, start: int, stop: int) -> Begun:
        """Start to compute some rows; the device may still compute them afterwards."""
        rounded = self._combiner.rounded(raw, start, stop) if self._combiner else None
        W = self.values.block(raw, start, stop) if rounded is None else raw
        base = self._base_rows(raw, start, stop)
        if self._observer and base is not None:
            self._observer.before(base, W, start, start + len(base))
        result = self._applied(W, start, stop) if rounded is None else rounded
        norms = tuple(edit.n[-1] if edit.n else None for edit in self.edits)
        sent = self._buffers.send(result, TORCH[self._item.dtype], [n for n in norms if n is not None])
        if base is not None:
            self._base.update(as_bytes(base))
        return Begun(raw, start, norms, sent)

    def finish(self, begun: Begun) -> Tensor:
        """Return the rows that were begun."""
        result = begun.sent.wait()
        if not begun.sent.all_finite():
            from .refusals import refuse_result

            raw, source = begun.raw, self._item.source
            if source.coded:  # decoded where the result was computed
                raw = self._buffers.raw(source, begun.start, begun.start + len(result))
            refuse_result(self._item, raw, result)
        if self._observer:
            self._observer.after(begun, result)
        return result

    def merged(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Return rows of the result before any rounding, on the device."""
        return self._applied(self.values.block(raw, start, stop), start, stop)

    def _applied(self, W: Tensor, start: int, stop: int) -> Tensor:
        if self._combiner:
            return self._combiner.apply(W, start, stop)
        return apply_edits(W, self.edits, start, stop, self._buffers)

    def _base_rows(self, raw: Tensor, start: int, stop: int) -> Tensor | None:
        """Return the base's rows: the source's rows, unless an adapter replaces the tensor; None if it has none."""
        item = self._item
        if not item.base or item.base.coded or start >= (rows := item.base.matrix[0]):
            return None
        return raw if item.source is item.base else self._buffers.raw(item.base, start, min(stop, rows), "base")

    def rest(self) -> Iterable[tuple[int, memoryview]]:
        """Yield the rows that an adapter adds below the source's."""
        rows, columns = self._item.matrix
        for start, stop in spans(self._item.grown, columns):
            empty = self._buffers.scratch("work", (stop - start, columns), self._buffers.spec.compute)
            W = self.values.set_rows_(empty, rows + start)
            result = self._buffers.land(W, TORCH[self._item.dtype])
            if not maths.all_finite(result):
                from .refusals import refuse_result

                refuse_result(self._item, W, result)
            yield rows + start, as_bytes(result)

    def result(self, written: Digest) -> TensorResult:
        """Return the hashes of both tensors, and the parts of the undo record."""
        item = self._item
        coded = item.base is not None and item.base.coded  # its parts are kept whole
        longer = item.base is not None and item.base.matrix[0] > item.source.matrix[0]
        for start, stop in spans(*item.base.matrix) if item.base and longer and not coded else ():
            if item.base and stop > (first := max(start, item.source.matrix[0])):
                data = as_bytes(self._buffers.raw(item.base, first, stop, "base"))
                self._base.update(data)
                if self._observer:
                    self._observer.beyond(data, first, stop)
        parts = self._observer.parts() if self._observer else ()
        if not item.base or coded:
            return TensorResult(None, written.fast, None, parts)
        cuts = self._combiner.cuts if self._combiner else ()
        return TensorResult(self._base.fast, written.fast, self._base.proof, parts, cuts=cuts)


@dataclass(frozen=True, kw_only=True)
class MergeStart:
    """Starts the maker of any tensor of a merge."""

    prove: bool = False
    observe: Observe | None = None
    combine: Combine | None = None
    memory: int = 0
    """Bytes that a worker may hold for several weights that are merged at once."""

    def __call__(self, item: Item, buffers: DeviceBuffers, spool: Spool) -> MergeMaker:
        """Load the edits of one item."""
        return MergeMaker(item, buffers, spool, prove=self.prove, observe=self.observe, combine=self.combine)


def load_edits(item: Item, buffers: DeviceBuffers) -> list[LoadedEdit]:
    """Read the tensors of all edits that every block needs."""
    return [LoadedEdit.load(edit, buffers) for edit in item.edits]


class SourceValues:
    """The values that edits start from: rows of a stored tensor, with the rows that an adapter replaces."""

    def __init__(self, item: Item, buffers: DeviceBuffers) -> None:
        self._item, self._buffers = item, buffers
        self.taken: tuple[Tensor, Tensor] | None = None
        """Factors of the part that training began without, oriented as the tensor is stored."""
        self._whole = self._without_start() if item.start else None
        self._rows = {row: (rows.value, k) for rows in item.rows for k, row in enumerate(rows.index)}

    def _without_start(self) -> Tensor:
        """Return the matrix that training began with, rounded as PEFT does when it loads the adapter."""
        low, edit = self._item.start, self._item.edits[0]
        assert low
        assert low.start
        W = self._buffers.stored(self._item.source).float()
        turned = edit.transposed
        rest, left, right = maths.without_start(W.T if turned else W, low.start.value, low.rank, low.scale)
        self.taken = (right.T, left.T) if turned else (left, right)
        rounded = rest.T if turned else rest
        return rounded.to(TORCH[self._item.source.dtype]).contiguous()

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Return a block in the compute dtype, on the device, from its raw rows."""
        W = self._buffers.lift(raw if self._whole is None else self._whole[start:stop])
        return self.set_rows_(W, start) if self._rows else W

    def set_rows_(self, W: Tensor, start: int) -> Tensor:
        """Set the rows that an adapter brings, in a block that begins with row `start`; runs are read at once."""
        row, stop = start, start + len(W)
        while row < stop:
            if not (first := self._rows.get(row)):
                row += 1
                continue
            value, k = first
            run = 1
            while row + run < stop and self._rows.get(row + run) == (value, k + run):
                run += 1
            W[row - start : row - start + run] = self._buffers.rows(value, k, k + run)
            row += run
        return W


def measure(item: Item, operands: Iterable[LoadedEdit], values: SourceValues, buffers: DeviceBuffers) -> None:
    """Compute the norms that run along the columns, in a first pass that adds squares block by block."""
    operands = tuple(operands)
    if any(operand.edit.follows or operand.transform for operand in operands):
        from . import following

        following.prepare(item, operands, values, buffers)
    pending = [operand for operand in operands if operand.edit.two_passes and not operand.edit.follows]
    squares: list[Tensor | float] = [0.0] * len(pending)
    for start, stop in item.spans() if pending else ():
        raw = buffers.raw(item.source, start, stop)
        for k, operand in enumerate(pending):
            squares[k] += operand.measured(values.block(raw, start, stop), start, stop)
    for total, operand in zip(squares, pending, strict=True):
        operand.n.append(torch.as_tensor(total).sqrt())
