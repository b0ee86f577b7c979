"""Recover one tensor of the base from the merged tensor and the undo record."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..engine.device_buffers import DeviceBuffers
from ..engine.following import norms_of
from ..engine.precision import TORCH, as_bytes, half_ulp
from ..maths import lora as maths
from ..output.finished import TensorResult
from ..plan.item import Item
from ..storage.reader import Digest, spans
from ..storage.safetensors import StoredTensor
from ..storage.spool import Spool
from .chain import inverse_of
from .expected_base import replaced_rows
from .inverse import as_rows
from .packing import Unpacker


class RecoveryMaker:
    """Predicts blocks of the base's tensor, and corrects them by the undo record."""

    proves_output = True

    def __init__(self, item: Item, buffers: DeviceBuffers, _: Spool) -> None:
        assert item.undo
        reader = buffers.reader
        self._item, self._buffers = item, buffers.exact()
        self._undo = item.undo
        taken, ulps = item.undo.taken, item.undo.ulps
        held = (self._buffers.whole(taken[0]), self._buffers.whole(taken[1])) if taken else None
        self._inverse = inverse_of(item, self._buffers, exact=ulps is not None, taken=held)
        self._norms = self._recorded() if item.undo.original is None else self._measured(item.undo.original)
        self._inverse.hold(self._read, self._norms_of)
        integers = maths.INTEGERS[TORCH[item.dtype].itemsize]
        self._ulps = Unpacker(ulps, reader, integers, item.source.matrix[1]) if ulps else None
        self._rows = replaced_rows(item, reader)
        self._merged = Digest(proof=False)
        self._ambiguous = 0

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Return rows of the base from the same rows of the merged tensor."""
        self._merged.update(as_bytes(raw))
        x = self._buffers.lift(raw)
        if self._item.edits:
            norms = self._norms_of(start, stop)
            half = self._halves(x, norms, start, stop)
            x = self._inverse.predict_(x, start, stop, norms)
            self._ambiguous += 0 if half is None else count_ambiguous(x, half, self._item.dtype)
        result = self._buffers.land(x, TORCH[self._item.dtype])
        if self._ulps:
            lost = self._ulps.next(result.numel()).view(result.shape)
            result = maths.at_ordinals(maths.ordinals(result) + lost, result.dtype)
        for row in range(start, stop) if self._rows else ():
            if row in self._rows:
                result[row - start] = self._replaced(*self._rows[row])
        return result

    def rest(self) -> Iterator[tuple[int, memoryview]]:
        """Yield the rows beyond the adapter's tensor; the undo record holds all of them."""
        first, (rows, columns) = self._item.source.matrix[0], (self._item.base or self._item.source).matrix
        for start, stop in spans(rows, columns) if self._undo.kept and not self._item.edits else ():
            for row in range(max(start, first), stop):
                values, k = self._rows[row]
                yield row, as_bytes(self._buffers.raw(values, k, k + 1, "factor"))

    def result(self, written: Digest) -> TensorResult:
        """Return the hashes of both tensors; the base's may be compared with the receipt's sha256."""
        return TensorResult(self._merged.fast, written.fast, written.proof, ambiguous=self._ambiguous)

    def _read(self, start: int, stop: int) -> Tensor:
        """Read rows of the merged tensor."""
        return self._buffers.lift(self._buffers.raw(self._item.source, start, stop))

    def _norms_of(self, start: int, stop: int) -> list[Tensor | None]:
        """Return the norms that a block needs, for each edit."""
        return [
            None if n is None else as_rows(n, start, stop, operand)
            for n, operand in zip(self._norms, self._inverse.operands, strict=True)
        ]

    def _recorded(self) -> list[Tensor | None]:
        return [self._buffers.whole(stored).flatten() if stored else None for stored in self._undo.norms]

    def _measured(self, original: StoredTensor) -> list[Tensor | None]:
        """Compute the norms of every DoRA edit from the base's own tensor."""
        blocks: list[list[Tensor]] = [[] for _ in self._item.edits]
        for start, stop in self._item.spans():
            raw = self._buffers.raw(original, start, stop)
            for edit, operand, norms in zip(self._item.edits, self._inverse.operands, blocks, strict=True):
                if edit.divides and not edit.follows:
                    norms.append(operand.measured(self._buffers.lift(raw), start, stop))
        for edit, norms in zip(self._item.edits, blocks, strict=True):
            if edit.divides and edit.follows:
                norms.append(norms_of(edit.follows, self._buffers).square_())
        return [
            None if not norms else (torch.cat(norms) if edit.axis else torch.stack(norms).sum(0)).sqrt()
            for edit, norms in zip(self._item.edits, blocks, strict=True)
        ]

    def _halves(self, x: Tensor, norms: list[Tensor | None], start: int, stop: int) -> Tensor | None:
        """Return the largest distance of W from its prediction: half an ulp of W', through the inverse.

        With an exact record the distance is not needed: None.
        """
        if self._ulps:
            return None
        half, (g, _) = half_ulp(x, self._item.source.dtype), self._inverse.coefficients(norms, start, stop)
        return half if g is None else half.mul_(g.abs())

    def _replaced(self, stored: StoredTensor, k: int) -> Tensor:
        """Return one replaced row of the base; the adapter's row counts if it rounds to the same values."""
        row = self._buffers.rows(stored, k, k + 1).cpu()
        return maths.round_to(row, torch.empty(row.shape, dtype=TORCH[self._item.dtype]))[0]


def count_ambiguous(x: Tensor, half: Tensor, dtype: str) -> int:
    """Count the elements for which more than one value of a dtype lies within `half` of x."""
    unit = half_ulp(x, dtype).mul_(2)
    most = torch.add(x, half).div_(unit).floor_()
    return int((most > torch.sub(x, half, out=half).div_(unit).ceil_()).sum())
