"""Make one output tensor: read a block of rows, apply the edits or take them out, round once, write it where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import NumericalError
from ..maths import lora as maths
from ..output.shards import ShardFiles
from ..plan.item import Item
from ..plan.plan import Plan
from ..storage.digests import Digest
from ..storage.reader import Reader
from ..storage.safetensors import BITS
from ..storage.spool import Part, Spool
from ..undo.keep import UndoKeeper
from ..undo.recover import Recovering
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit
from .memory import as_bytes
from .precision import TORCH


@dataclass(frozen=True)
class Made:
    """What is known of a tensor once it is written: hashes of what was read and written, and its undo parts."""

    read: Digest
    """Of the base's bytes, where there are any; of the merged ones where those are recovered."""
    written: Digest
    parts: tuple[Part, ...] = ()
    ambiguous: int = 0
    """Elements of a recovered tensor that several values of the base would have been merged to."""


class Blocks(Protocol):
    """Turns blocks of a source into blocks of an output."""

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Rows of the output, on the host, from those of the source."""

    def rest(self) -> Iterable[tuple[int, memoryview]]:
        """Rows beyond those of the source: where each block of them begins, and its bytes."""


def make(
    item: Item,
    buffers: DeviceBuffers,
    shards: ShardFiles,
    spool: Spool,
    plan: Plan,
    reader: Reader,
    advance: Callable[[int], None],
) -> Made:
    """Write one tensor that is not a plain copy.

    Raises NumericalError when a result is NaN, Inf, or too large for the output's dtype.
    """
    if item.undo:
        recovering = Recovering(item, buffers, reader)
        written = _write(item, recovering, buffers, shards, advance, proof=True)
        return Made(recovering.digest, written, (), recovering.ambiguous)
    merging = Merging(item, buffers, spool, plan)
    written = _write(item, merging, buffers, shards, advance, proof=False)
    merging.keeper.finish()
    return Made(merging.keeper.digest, written, merging.keeper.parts())


def _write(
    item: Item,
    blocks: Blocks,
    buffers: DeviceBuffers,
    shards: ShardFiles,
    advance: Callable[[int], None],
    *,
    proof: bool,
) -> Digest:
    digest, row_bytes = Digest(proof=proof), item.source.matrix[1] * BITS[item.dtype] // 8
    for start, stop in item.spans():
        data = as_bytes(blocks.block(buffers.raw(item.source, start, stop), start, stop))
        digest.update(data)
        shards.write(item, start * row_bytes, data)
        advance(len(data))
    for start, data in blocks.rest():
        digest.update(data)
        shards.write(item, start * row_bytes, data)
        advance(len(data))
    return digest


class Merging:
    """Blocks of an output tensor: the base's, or what an adapter has in its place, with all edits applied."""

    def __init__(self, item: Item, buffers: DeviceBuffers, spool: Spool, plan: Plan) -> None:
        self._item, self._buffers = item, buffers
        self._operands = [LoadedEdit.load(edit, buffers) for edit in item.edits]
        self._values = SourceValues(item, buffers)
        measure(item, self._operands, self._values, buffers)
        self.keeper = UndoKeeper(item, self._operands, self._values.taken, buffers, spool, plan)

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Rows of the output from those of the source."""
        W = self._values.block(raw, start, stop)
        self.keeper.see(raw, W, start, stop)
        result = self._buffers.land(apply(W, self._operands, start, stop), TORCH[self._item.dtype])
        if not maths.all_finite(result) or not all(operand.is_finite() for operand in self._operands):
            blame(self._item, raw, result)
        self.keeper.compare(raw, result, start, stop)
        return result

    def rest(self) -> Iterable[tuple[int, memoryview]]:
        """An output has no rows but the source's."""
        return ()


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


def apply(W: Tensor, operands: list[LoadedEdit], start: int, stop: int) -> Tensor:
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
