"""Make one of the base's tensors from the merged one and the undo record: the inverse of what `make` does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..engine.device_buffers import DeviceBuffers
from ..engine.memory import as_bytes
from ..engine.precision import TORCH
from ..engine.rows import replaced_rows
from ..maths import lora as maths
from ..output.finished import TensorResult
from ..parity.ulps import half_ulp
from ..plan.item import Item, spans
from ..storage.digests import Digest
from ..storage.safetensors import StoredTensor
from ..storage.spool import Spool
from .inverse import Inverse, as_rows
from .packing import Unpacker


class Recovering:
    """Blocks of the base's tensor: predicted, corrected by what the record holds of them."""

    proves_output = True

    def __init__(self, item: Item, buffers: DeviceBuffers, _: Spool) -> None:
        assert item.undo
        reader = buffers.reader
        self._item, self._buffers = item, buffers.exact()
        self._undo = item.undo
        taken = item.undo.taken
        held = (self._buffers.whole(taken[0]), self._buffers.whole(taken[1])) if taken else None
        self._inverse = Inverse(item, self._buffers, exact=item.undo.ulps is not None, taken=held)
        self._norms = self._recorded() if item.undo.original is None else self._measured(item.undo.original)
        places = maths.INTEGERS[TORCH[item.dtype].itemsize]
        self._ulps = (
            Unpacker(item.undo.ulps, reader, places, item.source.matrix[1]) if item.undo.ulps else None
        )
        self._rows = replaced_rows(item, reader)
        self._merged = Digest(proof=False)
        self._ambiguous = 0

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Rows of the base, from those of the merged tensor."""
        self._merged.update(as_bytes(raw))
        x = self._buffers.lift(raw)
        if self._item.edits:
            norms = [
                None if n is None else as_rows(n, start, stop, edit.axis)
                for n, edit in zip(self._norms, self._item.edits, strict=True)
            ]
            half = self._halves(x, norms, start, stop)
            x = self._inverse.predict_(x, start, stop, norms)
            self._ambiguous += 0 if half is None else several(x, half, self._item.dtype)
        result = self._buffers.land(x, TORCH[self._item.dtype])
        if self._ulps:
            lost = self._ulps.next(result.numel()).view(result.shape)
            result = maths.at_ordinals(maths.ordinals(result) + lost, result.dtype)
        for row in range(start, stop) if self._rows else ():
            if row in self._rows:
                result[row - start] = self._own(*self._rows[row])
        return result

    def rest(self) -> Iterator[tuple[int, memoryview]]:
        """Rows that the adapter's tensor has no place for: all of them are in the record."""
        first, (rows, columns) = self._item.source.matrix[0], (self._item.base or self._item.source).matrix
        for start, stop in spans(rows, columns) if self._undo.kept and not self._item.edits else ():
            for row in range(max(start, first), stop):
                values, place = self._rows[row]
                yield row, as_bytes(self._buffers.raw(values, place, place + 1, "factor"))

    def result(self, written: Digest) -> TensorResult:
        """Return the hashes of both tensors; the base's may be compared with the receipt's sha256."""
        return TensorResult(self._merged.fast, written.fast, written.proof, ambiguous=self._ambiguous)

    def _recorded(self) -> list[Tensor | None]:
        return [self._buffers.whole(stored).flatten() if stored else None for stored in self._undo.norms]

    def _measured(self, original: StoredTensor) -> list[Tensor | None]:
        """The norms of every edit that has some, from the base's own tensor."""
        found: list[list[Tensor]] = [[] for _ in self._item.edits]
        for start, stop in self._item.spans():
            raw = self._buffers.raw(original, start, stop)
            for edit, operand, norms in zip(self._item.edits, self._inverse.operands, found, strict=True):
                if edit.decomposed:
                    n = maths.norms(operand.add_(self._buffers.lift(raw), start, stop), edit.axis)
                    norms.append(n if edit.axis else n.square_())
        return [
            None if not norms else torch.cat(norms) if edit.axis else torch.stack(norms).sum(0).sqrt()
            for edit, norms in zip(self._item.edits, found, strict=True)
        ]

    def _halves(self, x: Tensor, norms: list[Tensor | None], start: int, stop: int) -> Tensor | None:
        """How far W may lie from its prediction: half an ulp of W', through the inverse. Of no use where ulps are kept."""
        if self._ulps:
            return None
        half = half_ulp(x, self._item.source.dtype)
        g = self._inverse.gain(norms, start, stop)
        return half if g is None else half.mul_(g.abs())

    def _own(self, stored: StoredTensor, place: int) -> Tensor:
        """One row that was replaced: the base's, or the adapter's where that is the same once rounded."""
        row = self._buffers.rows(stored, place, place + 1).cpu()
        return maths.round_to(row, torch.empty(row.shape, dtype=TORCH[self._item.dtype]))[0]


def several(x: Tensor, half: Tensor, dtype: str) -> int:
    """How many elements are ambiguous: more than one value of a dtype lies within `half` of x."""
    unit = half_ulp(x, dtype).mul_(2)
    most = torch.add(x, half).div_(unit).floor_()
    return int((most > torch.sub(x, half, out=half).div_(unit).ceil_()).sum())
