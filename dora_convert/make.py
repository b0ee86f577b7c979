"""Make one output tensor: read a block of rows, apply the edits, round once, write it where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from . import maths
from .blocks import spans
from .errors import NumericalError
from .items import Item
from .lane import Lane
from .memory import as_bytes
from .operands import Operand
from .plan import Options
from .precision import TORCH
from .undo import Part, ReplacedRows, Spool
from .writer import ShardFiles


@dataclass(frozen=True)
class Made:
    """What is known of a tensor once it is written: xxh3-128 of its old and new bytes, and its undo parts."""

    base_hash: str | None
    """None where the base has no such tensor."""
    written_hash: str
    parts: tuple[Part, ...] = ()


class Values:
    """Where an item's values start: rows of a stored tensor, with what an adapter puts in their place."""

    def __init__(self, item: Item, lane: Lane) -> None:
        self._item, self._lane = item, lane
        self._whole = self._without_start() if item.start else None
        self._rows = {row: (rows.value, place) for rows in item.rows for place, row in enumerate(rows.index)}

    def _without_start(self) -> Tensor:
        """The whole matrix as training began with it, rounded as PEFT rounds it when it loads the adapter."""
        low, edit = self._item.start, self._item.edits[0]
        assert low
        assert low.start
        W = self._lane.stored(self._item.source).float()
        left = maths.without_start(W.T if edit.transposed else W, low.start.value, low.rank, low.scale)
        rounded = left.T if edit.transposed else left
        return rounded.to(TORCH[self._item.source.dtype]).contiguous()

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """A block in the compute dtype, on the device, from its raw rows."""
        W = self._lane.lift(raw if self._whole is None else self._whole[start:stop])
        for row in range(start, stop) if self._rows else ():
            if row in self._rows:
                value, place = self._rows[row]
                W[row - start] = self._lane.rows(value, place, place + 1)[0]
        return W


def make(
    item: Item, lane: Lane, shards: ShardFiles, spool: Spool, options: Options, advance: Callable[[int], None]
) -> Made:
    """Write one tensor that is not a plain copy.

    Raises NumericalError when a result is NaN, Inf, or too large for the output's dtype.
    """
    operands = [Operand.load(edit, lane) for edit in item.edits]
    values = Values(item, lane)
    measure(item, operands, values, lane)
    before, after = Before(item, lane, spool, options), xxhash.xxh3_128()
    row_bytes = item.nbytes // max(1, item.source.matrix[0])
    for start, stop in item.spans():
        raw = lane.raw(item.source, start, stop)
        W = values.block(raw, start, stop)
        before.see(raw, W, start, stop)
        result = lane.land(apply(W, operands, start, stop), TORCH[item.dtype])
        if not maths.all_finite(result) or not all(operand.is_finite() for operand in operands):
            blame(item, raw, result)
        data = as_bytes(result)
        after.update(data)
        shards.write(item, start * row_bytes, data)
        advance(len(data))
    parts = before.finish()
    if options.undo != "none":
        parts += norm_parts(item, operands, spool)
    return Made(before.hash, after.hexdigest(), tuple(parts))


class Before:
    """The base's tensor while another is made of it: its hash, and the rows that a replacement changes."""

    def __init__(self, item: Item, lane: Lane, spool: Spool, options: Options) -> None:
        self._base, self._source, self._name, self._lane = item.base, item.source, item.name, lane
        self._keeps = item.replaced and not item.added and options.undo != "none"
        self._digest, self._kept = xxhash.xxh3_128(), ReplacedRows(spool)

    def see(self, raw: Tensor, W: Tensor, start: int, stop: int) -> None:
        """One block: what is read for it, and its values before the edits."""
        if not self._base or start >= (rows := self._base.matrix[0]):
            return
        stop = min(stop, rows)
        base = raw if self._source is self._base else self._lane.raw(self._base, start, stop, "base")
        self._digest.update(as_bytes(base))
        if self._keeps:
            new = W[: stop - start].cpu().double()  # in this order: mps has no float64
            keep_rows(self._kept, start, base, maths.round_to(new, torch.empty_like(base)))

    def finish(self) -> list[Part]:
        """Rows that the output has no place for, and the undo parts of all that were kept."""
        if not self._base:
            return []
        rows, columns = self._base.matrix
        for start, stop in spans(rows, columns):
            if stop > self._source.matrix[0]:
                first = max(start, self._source.matrix[0])
                base = self._lane.raw(self._base, first, stop, "base")
                self._digest.update(as_bytes(base))
                if self._keeps:
                    self._kept.add(range(first, stop), bytes(as_bytes(base)))
        return self._kept.parts(self._name, self._base.dtype, columns)

    @property
    def hash(self) -> str | None:
        """xxh3-128 of the base's bytes."""
        return self._digest.hexdigest() if self._base else None


def measure(item: Item, operands: Iterable[Operand], values: Values, lane: Lane) -> None:
    """The first of two passes: norms along the columns, their squares added block after block."""
    pending = [operand for operand in operands if operand.edit.two_passes]
    if not pending:
        return
    squares: list[Tensor | float] = [0.0] * len(pending)
    for start, stop in item.spans():
        raw = lane.raw(item.source, start, stop)
        for k, operand in enumerate(pending):
            V = operand.add_(values.block(raw, start, stop), start, stop)
            squares[k] += maths.norms(V, axis=0).square_()
    for total, operand in zip(squares, pending, strict=True):
        operand.n.append(torch.as_tensor(total).sqrt())


def apply(W: Tensor, operands: list[Operand], start: int, stop: int) -> Tensor:
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


def keep_rows(kept: ReplacedRows, start: int, base: Tensor, new: Tensor) -> None:
    """Keep the base's rows that a replacement changes."""
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
    rows = (base.view(size) != new.view(size)).any(dim=1).nonzero().flatten()
    if len(rows):
        kept.add((rows + start).tolist(), bytes(as_bytes(base[rows])))


def norm_parts(item: Item, operands: Iterable[Operand], spool: Spool) -> list[Part]:
    """The norms of every decomposed edit, in float32, as parts of the undo record."""
    parts = []
    for number, operand in enumerate(operands):
        if operand.m is not None:
            n = torch.cat(operand.n).to("cpu", torch.float32)
            parts.append(Part(f"norm/{number}/{item.name}", "F32", tuple(n.shape), (spool.add(as_bytes(n)),)))
    return parts


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
