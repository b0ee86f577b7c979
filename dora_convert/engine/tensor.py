"""Make one output tensor: read a block of rows, transform it, write it where it belongs.

`Merging` is the transformation that a merge is: apply the edits, round once. What else may be done to a tensor, such as
taking the edits out again, is a `TensorMaker` of another room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import NumericalError
from ..maths import lora as maths
from ..output.finished import TensorResult
from ..output.shards import ShardFiles
from ..plan.item import Item
from ..storage.reader import Digest
from ..storage.safetensors import BITS
from ..storage.spool import Spool, SpooledTensor
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit
from .memory import as_bytes
from .precision import TORCH


class TensorMaker(Protocol):
    """Turns blocks of a source tensor into blocks of an output tensor."""

    proves_output: bool
    """True if the sha256 of the written bytes is needed."""

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Return rows of the output, in host memory, from the same rows of the source."""

    def rest(self) -> Iterable[tuple[int, memoryview]]:
        """Yield the output's rows beyond the source's last one: the first row of each block, and its bytes."""

    def result(self, written: Digest) -> TensorResult:
        """Return the facts about the finished tensor, whose written bytes have these hashes."""


MakeTensor = Callable[[Item, DeviceBuffers, Spool], TensorMaker]
"""Starts the maker of one item; called in the worker that makes it."""


class MergeObserver(Protocol):
    """Sees every block of one tensor while it is merged, to keep what undoing the merge needs."""

    def before(self, base: Tensor, W: Tensor, start: int, stop: int) -> None:
        """See some rows before the edits: the base's bytes, and the values that the edits start from."""

    def after(self, raw: Tensor, result: Tensor, start: int, stop: int) -> None:
        """See some rows after the edits: the source's bytes, and the output's."""

    def beyond(self, base: memoryview, start: int, stop: int) -> None:
        """See rows of the base that the output has no place for."""

    def parts(self) -> tuple[SpooledTensor, ...]:
        """Return the tensors of the undo record."""


Observe = Callable[[Item, "Merging", DeviceBuffers, Spool], "MergeObserver | None"]
"""Starts the observer of one item; None where nothing of it must be kept."""


def make_tensor(
    item: Item,
    maker: TensorMaker,
    buffers: DeviceBuffers,
    shards: ShardFiles,
    advance: Callable[[int], None],
) -> TensorResult:
    """Write one tensor that is not a plain copy; `advance` is called with the bytes of each block.

    Raises NumericalError when a result is NaN, Inf, or too large for the output's dtype.
    """
    digest, row_bytes = Digest(proof=maker.proves_output), item.source.matrix[1] * BITS[item.dtype] // 8

    def write(start: int, data: memoryview) -> None:
        digest.update(data)
        shards.write(item, start * row_bytes, data)
        advance(len(data))

    for start, stop in item.spans():
        write(start, as_bytes(maker.block(buffers.raw(item.source, start, stop), start, stop)))
    for start, data in maker.rest():
        write(start, data)
    return maker.result(digest)


class Merging:
    """Makes an output tensor of the base's, or of what an adapter has in its place: all edits applied."""

    proves_output = False

    def __init__(
        self,
        item: Item,
        buffers: DeviceBuffers,
        spool: Spool,
        *,
        prove: bool = False,
        observe: Observe | None = None,
    ) -> None:
        """`prove` asks for the sha256 of the base's bytes, too."""
        self._item, self._buffers = item, buffers
        self.edits: Sequence[LoadedEdit] = [LoadedEdit.load(edit, buffers) for edit in item.edits]
        self.values = SourceValues(item, buffers)
        measure(item, self.edits, self.values, buffers)
        self._base = Digest(proof=prove)
        self._observer = observe(item, self, buffers, spool) if observe else None

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Return rows of the output from those of the source."""
        W = self.values.block(raw, start, stop)
        self._see_base(raw, W, start, stop)
        result = self._buffers.land(apply(W, self.edits, start, stop), TORCH[self._item.dtype])
        if not maths.all_finite(result) or not all(edit.is_finite() for edit in self.edits):
            blame(self._item, raw, result)
        if self._observer:
            self._observer.after(raw, result, start, stop)
        return result

    def _see_base(self, raw: Tensor, W: Tensor, start: int, stop: int) -> None:
        """Hash the base's rows, which are the source's unless an adapter replaces them."""
        item = self._item
        if not item.base or start >= (rows := item.base.matrix[0]):
            return
        stop = min(stop, rows)
        base = raw if item.source is item.base else self._buffers.raw(item.base, start, stop, "base")
        self._base.update(as_bytes(base))
        if self._observer:
            self._observer.before(base, W, start, stop)

    def rest(self) -> Iterable[tuple[int, memoryview]]:
        """Return nothing: an output has no rows but the source's."""
        return ()

    def result(self, written: Digest) -> TensorResult:
        """Return the hashes of both tensors, and what was kept of the base's."""
        item = self._item
        for start, stop in item.base_spans():
            if item.base and stop > (first := max(start, item.source.matrix[0])):
                data = as_bytes(self._buffers.raw(item.base, first, stop, "base"))
                self._base.update(data)
                if self._observer:
                    self._observer.beyond(data, first, stop)
        parts = self._observer.parts() if self._observer else ()
        if not item.base:
            return TensorResult(None, written.fast, None, parts)
        return TensorResult(self._base.fast, written.fast, self._base.proof, parts)


class SourceValues:
    """Where an item's values start: rows of a stored tensor, with what an adapter puts in their place."""

    def __init__(self, item: Item, buffers: DeviceBuffers) -> None:
        self._item, self._buffers = item, buffers
        self.taken: tuple[Tensor, Tensor] | None = None
        """Factors of what training began without, the way round that the tensor is stored."""
        self._whole = self._without_start() if item.start else None
        self._rows = {row: (rows.value, place) for rows in item.rows for place, row in enumerate(rows.index)}

    def _without_start(self) -> Tensor:
        """The whole matrix as training began with it, rounded as PEFT rounds it when it loads the adapter."""
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
        """A block in the compute dtype, on the device, from its raw rows."""
        W = self._buffers.lift(raw if self._whole is None else self._whole[start:stop])
        for row in range(start, stop) if self._rows else ():
            if row in self._rows:
                value, place = self._rows[row]
                W[row - start] = self._buffers.rows(value, place, place + 1)[0]
        return W


def measure(item: Item, operands: Iterable[LoadedEdit], values: SourceValues, buffers: DeviceBuffers) -> None:
    """The first of two passes: norms along the columns, their squares added block after block."""
    pending = [operand for operand in operands if operand.edit.two_passes]
    if not pending:
        return
    squares: list[Tensor | float] = [0.0] * len(pending)
    for start, stop in item.spans():
        raw = buffers.raw(item.source, start, stop)
        for k, operand in enumerate(pending):
            V = operand.add_(values.block(raw, start, stop), start, stop)
            squares[k] += maths.norms(V, axis=0).square_()
    for total, operand in zip(squares, pending, strict=True):
        operand.n.append(torch.as_tensor(total).sqrt())


def apply(W: Tensor, operands: Sequence[LoadedEdit], start: int, stop: int) -> Tensor:
    """W + Σ wᵢ·(applyᵢ(W) − W) (4), in place; norms are always of the unmerged W."""
    if len(operands) == 1 and operands[0].m is not None and operands[0].edit.weight == 1:
        return operands[0].decompose_(W, start, stop)
    unmerged = W.clone() if any(operand.m is not None for operand in operands) else W
    for operand in operands:
        if operand.m is None:
            operand.add_(W, start, stop, operand.edit.weight)
        else:
            change = operand.decompose_(unmerged.clone(), start, stop) - unmerged
            W.add_(change, alpha=operand.edit.weight)
    return W


def blame(item: Item, raw: Tensor, result: Tensor) -> None:
    """Raise the error that says why a result is not finite; a conversion may keep what was not finite before."""
    if not item.changed and torch.equal(torch.isfinite(result), torch.isfinite(raw)):
        return
    if not torch.isfinite(raw).all():
        owner = "BASE's" if item.source is item.base else "The adapter's"
        raise NumericalError(
            f"{owner} tensor {item.source.name} holds NaN or Inf.", hint="the file is damaged"
        )
    if torch.isnan(result).any():
        raise NumericalError(
            f"{item.name}: W + sBA has an output whose weights are all zero, so DoRA's m/‖V‖ is undefined.",
            hint="is this the base that the adapter was trained on?",
        )
    raise NumericalError(
        f"{item.name} overflows {item.dtype}.", hint="--dtype bfloat16 or float32 has the range"
    )
