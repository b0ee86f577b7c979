"""Keep what an unmerge needs of the base's tensors while they are merged."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..engine.device_buffers import Begun, DeviceBuffers
from ..engine.factors import LoadedEdit
from ..engine.precision import TORCH, as_bytes
from ..engine.protocols import Taken
from ..maths import lora as maths
from ..plan.item import Item
from ..plan.plan import Plan
from ..storage.reader import spans
from ..storage.spool import Segment, Spool, SpooledTensor
from .chain import inverse_of
from .inverse import recorded
from .packing import pack


@dataclass(frozen=True)
class UndoKeepers:
    """Starts the keepers of a plan's undo record."""

    plan: Plan

    def __call__(
        self, item: Item, edits: Sequence[LoadedEdit], taken: Taken, buffers: DeviceBuffers, spool: Spool
    ) -> UndoKeeper | None:
        """Return the keeper of one item; None if an unmerge needs the output alone."""
        exact = self.plan.options.exact
        if not self.plan.remembers(item) or not item.undo_bytes(exact=exact):
            return None
        return UndoKeeper(item, edits, taken, buffers, spool, exact=exact)

    def stack(self, weights: Sequence[Item], norms: Tensor | None, spool: Spool) -> Sequence[tuple[SpooledTensor, ...]]:
        """Keep the norms of whole weights of one shape, all at once; return the parts of each."""
        if norms is None:
            return [()] * len(weights)
        kept = spool.add(as_bytes(norms.to("cpu", torch.float32)))
        size = kept.length // len(weights)
        segments = (Segment(kept.start + k * size, size) for k in range(len(weights)))
        return [
            (SpooledTensor(f"norm/0/{weight.origin}", "F32", (size // 4,), (segment,)),)
            if self.plan.remembers(weight)
            else ()
            for weight, segment in zip(weights, segments, strict=True)
        ]


class UndoKeeper:
    """Keeps what an unmerge of one tensor needs, while the tensor is merged."""

    def __init__(
        self,
        item: Item,
        edits: Sequence[LoadedEdit],
        taken: Taken,
        buffers: DeviceBuffers,
        spool: Spool,
        *,
        exact: bool,
    ) -> None:
        self._item, self._operands, self._taken = item, edits, taken
        self._buffers, self._spool = buffers, spool
        self._index: list[int] = []
        self._segments: list[Segment] = []
        exact = exact and item.source is item.base
        self._loss = RoundingLoss(item, self._taken, buffers, spool) if exact else None

    def before(self, base: Tensor, W: Tensor, start: int, stop: int) -> None:
        """Keep the base's rows that a replacement changes."""
        if self._item.replaced:
            new = W[: stop - start].cpu().double()  # in this order: mps has no float64
            self._keep_rows(start, base, maths.round_to(new, torch.empty_like(base)))

    def beyond(self, base: memoryview, start: int, stop: int) -> None:
        """Keep the base's rows beyond the output's last row."""
        self._add(range(start, stop), bytes(base))

    def _keep_rows(self, start: int, base: Tensor, new: Tensor) -> None:
        """Keep the base's rows that a replacement changes; float32 cannot tell for a float64."""
        item, differ = self._item, maths.ordinals(base) != maths.ordinals(new)
        stored = (item.source.dtype, *(rows.value.dtype for rows in item.rows))
        if self._buffers.spec.compute == torch.float32 and "F64" in stored:
            differ.fill_(True)
        if len(rows := differ.any(dim=1).nonzero().flatten()):
            self._add((rows + start).tolist(), bytes(as_bytes(base[rows])))

    def _add(self, rows: Iterable[int], data: bytes) -> None:
        """Spool some of the base's rows: their bytes now, their numbers at the end."""
        if data:
            self._index.extend(rows)
            self._segments.append(self._spool.add(data))

    def after(self, begun: Begun, result: Tensor) -> None:
        """Keep what rounding took from the base's rows, for an exact record."""
        if self._loss:
            known = zip(self._operands, begun.norms, strict=True) if self._item.invertible else ()
            norms = [n if operand.edit.divides else None for operand, n in known]
            self._loss.see(begun.raw, result, begun.start, norms)

    def parts(self) -> tuple[SpooledTensor, ...]:
        """Return the tensors of the undo record, in their order."""
        item = self._item
        if not item.base:
            return ()
        parts = []
        if count := len(self._index):
            numbers, columns = struct.pack(f"<{count}q", *self._index), item.base.matrix[1]
            rows = SpooledTensor(f"rows/{item.origin}", item.base.dtype, (count, columns), tuple(self._segments))
            parts = [rows, SpooledTensor(f"index/{item.origin}", "I64", (count,), (self._spool.add(numbers),))]
        if item.source is not item.base:
            return tuple(parts)
        for number, operand in enumerate(self._operands if item.invertible else ()):
            if operand.edit.divides:
                n = (torch.cat(operand.n) if len(operand.n) > 1 else operand.n[0]).to("cpu", torch.float32)
                parts.append(self._part(f"norm/{number}", n))
        for side, factor in zip(("left", "right"), self._taken or (), strict=False):
            parts.append(self._part(f"start/{side}", factor.to("cpu", torch.float32).contiguous()))
        return (*parts, *(self._loss.parts() if self._loss else ()))

    def _part(self, kind: str, tensor: Tensor) -> SpooledTensor:
        name = f"{kind}/{self._item.origin}"
        return SpooledTensor(name, "F32", tuple(tensor.shape), (self._spool.add(as_bytes(tensor)),))


@dataclass
class RoundingLoss:
    """The rounding loss of one tensor, block by block: the base's bits less the predicted ones, in ulps."""

    item: Item
    taken: Taken
    buffers: DeviceBuffers
    spool: Spool
    segments: list[Segment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._exact = self.buffers.exact()
        computed = self._exact.computed
        taken = (computed(self.taken[0]), computed(self.taken[1])) if self.taken else None
        self._inverse = inverse_of(self.item, self._exact, exact=True, taken=taken)
        self._rows = sorted({row for rows in self.item.rows for row in rows.index})

    def see(self, raw: Tensor, result: Tensor, start: int, norms: Sequence[Tensor | None]) -> None:
        """Pack the loss of one block, from the base's bytes and the output's."""
        base, stop = self.item.base, start + len(raw)
        assert base
        as_kept = [None if n is None else recorded(n).to(self._exact.spec.device) for n in norms]
        predicted = self._exact.land(
            self._inverse.predict_(self._exact.lift(result), start, stop, as_kept), TORCH[base.dtype]
        )
        integers = maths.INTEGERS[base.itemsize]
        ordinals, lost = (self._exact.scratch(name, raw.shape, integers, on_host=True) for name in ("ordinals", "lost"))
        maths.ordinals(raw, lost).sub_(maths.ordinals(predicted, ordinals))
        if own := [row - start for row in self._rows if start <= row < stop]:
            lost[own] = 0  # these rows are in the record, or in the adapter
        for first, last in spans(*lost.shape):  # an unmerge unpacks them on a processor
            self.segments.append(self.spool.add(pack(lost[first:last])))

    def parts(self) -> list[SpooledTensor]:
        """Return one tensor of bytes: the packed blocks."""
        length = sum(segment.length for segment in self.segments)
        return [SpooledTensor(f"ulps/{self.item.origin}", "U8", (length,), tuple(self.segments))]
