"""Make one output tensor: read a block of rows, apply the edits, round once, write it where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

from . import maths
from .blocks import spans
from .errors import NumericalError
from .lane import Lane
from .memory import as_bytes
from .plan import Edit, Item, Options
from .precision import TORCH
from .undo import Part, ReplacedRows, Spool
from .updates import Decomposed, low_rank
from .writer import ShardFiles


@dataclass(frozen=True)
class Made:
    """What is known of a tensor once it is written: xxh3-128 of its old and new bytes, and its undo parts."""

    base_hash: str
    written_hash: str
    parts: tuple[Part, ...] = ()


@dataclass
class Operand:
    """An edit with its tensors at hand, the way round that the weight is stored: V = W + s·left·right."""

    edit: Edit
    lane: Lane
    right: Tensor
    m: Tensor | None
    n: list[Tensor] = field(default_factory=list)
    """Norms: one tensor per block, or one for all blocks where they run along the columns."""

    @classmethod
    def load(cls, edit: Edit, lane: Lane) -> Operand:
        """Read what is needed for every block."""
        low = low_rank(edit.update)
        right = lane.whole(low.B).T if edit.slot.transposed else lane.whole(low.A)
        m = lane.whole(edit.update.m).flatten() if isinstance(edit.update, Decomposed) else None
        return cls(edit, lane, right, m)

    def left(self, start: int, stop: int) -> Tensor:
        """The factor's rows for some rows of the stored weight."""
        low = low_rank(self.edit.update)
        if self.edit.slot.transposed:
            return self.lane.columns(low.A, start, stop).T
        return self.lane.rows(low.B, start, stop)

    def add_(self, W: Tensor, start: int, stop: int, weight: float = 1.0) -> Tensor:
        """W + w·s·BA, in place."""
        return maths.add_low_rank_(
            W, self.left(start, stop), self.right, weight * low_rank(self.edit.update).scale
        )

    def decompose_(self, W: Tensor, start: int, stop: int) -> Tensor:
        """m·V/‖V‖, in place."""
        assert self.m is not None
        V = self.add_(W, start, stop)
        if self.edit.two_passes:
            return maths.rescale_(V, self.m, self.n[0], axis=0)
        self.n.append(maths.norms(V, axis=1))
        return maths.rescale_(V, self.m[start:stop], self.n[-1], axis=1)


def make(
    item: Item, lane: Lane, shards: ShardFiles, spool: Spool, options: Options, advance: Callable[[int], None]
) -> Made:
    """Write one tensor that is not a plain copy.

    Raises NumericalError when a result is NaN, Inf, or too large for the output's dtype.
    """
    operands = [Operand.load(edit, lane) for edit in item.edits]
    measure(item, operands, lane)
    before, after = xxhash.xxh3_128(), xxhash.xxh3_128()
    replaced = ReplacedRows(spool)
    row_bytes = item.nbytes // max(1, item.source.matrix[0])
    for start, stop in spans(item.source):
        raw = lane.raw(item.source, start, stop)
        base = lane.raw(item.base, start, stop, "base") if item.replaced else raw
        before.update(as_bytes(base))
        if item.replaced and options.undo != "none":
            keep_rows(replaced, start, base, maths.round_to(raw.double(), torch.empty_like(base)))
        result = lane.land(apply(lane.lift(raw), operands, start, stop), TORCH[item.dtype])
        if not maths.all_finite(result):
            blame(item, raw, result)
        data = as_bytes(result)
        after.update(data)
        shards.write(item, start * row_bytes, data)
        advance(len(data))
    parts = replaced.parts(item.name, item.base.dtype, item.base.matrix[1])
    if options.undo != "none":
        parts += norm_parts(item, operands, spool)
    return Made(before.hexdigest(), after.hexdigest(), tuple(parts))


def measure(item: Item, operands: Iterable[Operand], lane: Lane) -> None:
    """The first of two passes: norms along the columns, their squares added block after block."""
    pending = [operand for operand in operands if operand.edit.two_passes]
    if not pending:
        return
    squares: list[Tensor | float] = [0.0] * len(pending)
    for start, stop in spans(item.source):
        raw = lane.raw(item.source, start, stop)
        for k, operand in enumerate(pending):
            squares[k] += maths.norms(operand.add_(lane.lift(raw), start, stop), axis=0).square_()
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
        owner = "The adapter's" if item.replaced else "BASE's"
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
