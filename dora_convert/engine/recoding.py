"""Write a merged weight in the codes of its base: block by block, with the numbers that each block's codes need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..codecs import encoding
from ..codecs.bitsandbytes import Nibbles
from ..codecs.blocks import Blocks
from ..codecs.coded import CHUNK_ELEMENTS, CodedTensor, as_bytes_of
from ..codecs.codes import packed
from ..codecs.numbers import unpack, values
from ..errors import NumericalError
from ..maths.lora import all_finite
from ..output.finished import TensorResult
from ..output.shards import ShardFiles
from ..plan.item import Item
from ..storage.reader import Digest, spans
from .decoding import StoredParts
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit
from .precision import as_bytes
from .refusals import refuse_overflow


class ValueMaker(Protocol):
    """Makes the values of a merge."""

    edits: Sequence[LoadedEdit]

    def merged(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Return rows of the result before any rounding, on the device."""

    def result(self, written: Digest) -> TensorResult:
        """Return the facts about the finished weight."""


def write_coded(
    item: Item, maker: ValueMaker, buffers: DeviceBuffers, shards: ShardFiles, advance: Callable[[int], None]
) -> dict[str, TensorResult]:
    """Write all parts of a merged weight that change; return the facts about each by its name, the codes' last.

    Raises NumericalError if a result is NaN or Inf.
    """
    recoded = RecodedTensor(item, maker, buffers)
    blocks = recoded.nibbles() if isinstance(recoded.scheme, Nibbles) else recoded.blocks()
    outputs = {"codes": item, **dict(item.parts)}
    digests = {role: Digest(proof=False) for role in outputs}
    places = dict.fromkeys(outputs, 0)
    for pieces in blocks:
        for role, piece in pieces.items():
            data = as_bytes(piece.to("cpu").contiguous())
            shards.write(outputs[role], places[role], data)
            digests[role].update(data)
            places[role] += len(data)
            advance(len(data))
    for role, output in outputs.items():
        assert places[role] == output.nbytes, f"{output.name}: {places[role]} of {output.nbytes} bytes"
    others = {output.name: TensorResult(None, digests[role].fast, None) for role, output in item.parts}
    return {**others, item.name: maker.result(digests["codes"])}


@dataclass
class RecodedTensor:
    """The parts of one merged weight, in the order of their rows."""

    item: Item
    maker: ValueMaker
    buffers: DeviceBuffers

    def __post_init__(self) -> None:
        source = self.item.source
        assert isinstance(source, CodedTensor)
        self._tensor, self.scheme = source, source.scheme
        self._parts = StoredParts(self.buffers.reader, self.buffers.spec.device)
        self._dtypes = {role: part.dtype for role, part in self.item.parts}
        self._fresh = source.scheme.writes == "asked"
        self._columns = source.columns
        index = source.parts.get("index")
        self._index: Tensor | None = None
        if index and source.parts["scale"].shape[-1] > 1:
            raw = self._parts.rows(as_bytes_of(index, 1), 0, 1)
            self._index = values(raw, index.dtype).long().flatten().clamp_(min=0)

    @property
    def _scheme(self) -> Blocks:
        assert isinstance(self.scheme, Blocks)
        return self.scheme

    def nibbles(self) -> Iterator[dict[str, Tensor]]:
        """Yield the bytes of codes of 4 bits in one line, and of their scales."""
        from .recoding_nibbles import nibble_blocks

        return nibble_blocks(self._tensor, self._merged, self._parts, partial(refuse_overflow, self.item))

    def blocks(self) -> Iterator[dict[str, Tensor]]:
        """Yield the bytes of each block of rows, by role."""
        height = self._scheme.height
        for first in range(0, self._tensor.numel // self._columns, height):
            if self._scheme.step == 0:
                yield from self._with_one_scale(first, first + height)
                continue
            for start, stop in self._spans(first, height):
                x = self._merged(start, stop)
                numbers = self._settled(start, stop, *self._extremes(x))
                yield {"codes": self._codes(x, numbers), **self._stored(numbers, start, stop)}

    def _spans(self, first: int, height: int) -> Iterator[tuple[int, int]]:
        step = max(1, self._scheme.step) * (32 if self._scheme.packed_zeros and "zero" in self._tensor.parts else 1)
        for start, stop in spans(height, self._columns, step=step):
            yield first + start, first + stop

    def _with_one_scale(self, first: int, last: int) -> Iterator[dict[str, Tensor]]:
        """Yield the blocks of a matrix whose rows all share their scales: these need a first pass."""
        low = high = torch.zeros(())
        for start, stop in self._spans(first, last - first):
            least, most = self._extremes(self._merged(start, stop), blocks=1)
            low = least if start == first else low.minimum(least)
            high = most if start == first else high.maximum(most)
        numbers = self._settled(first, last, low, high)
        for start, stop in self._spans(first, last - first):
            pieces = self._stored(numbers, start, stop) if start == first else {}
            yield {"codes": self._codes(self._merged(start, stop), numbers), **pieces}

    def _merged(self, start: int, stop: int) -> Tensor:
        """Return some rows of the merge's result, in the compute dtype on the device."""
        x = self.maker.merged(self.buffers.raw(self.item.source, start, stop, "work"), start, stop)
        if not all_finite(x) or not all(edit.is_finite() for edit in self.maker.edits):
            raise NumericalError(
                f"{self.item.name}: the merged weight holds NaN or Inf.",
                hint="is this the base that the adapter was trained on?",
            )
        return x.double() if x.device.type != "mps" else x.cpu().double()

    def _extremes(self, x: Tensor, blocks: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the extremes of each block of some rows, a few rows at a time; `blocks` of rows are all of them."""
        together = -(-len(x) // blocks) if blocks else self._scheme.rows
        height = max(1, CHUNK_ELEMENTS // self._columns)
        if together == 1:
            pieces = [encoding.extremes(self._scheme, part, self._index) for part in _cut(x, height)]
            return torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
        low, high = [], []
        for block in _cut(x, together):
            pieces = [encoding.extremes(self._scheme, part, None) for part in _cut(block, height)]
            low.append(torch.cat([piece[0] for piece in pieces]).amin(0))
            high.append(torch.cat([piece[1] for piece in pieces]).amax(0))
        return torch.stack(low), torch.stack(high)

    def _settled(self, start: int, stop: int, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Return the numbers of some rows' blocks: the old ones, or new ones where values do not fit."""
        old = {
            role: self._old(role, start, stop, low) for role in ("scale", "zero", "bias") if role in self._tensor.parts
        }
        if overall := self._tensor.parts.get("global"):
            old["global"] = values(self._parts.rows(as_bytes_of(overall, 1), 0, 1), overall.dtype)
        new = encoding.settle(self._scheme, old, low, high, self._dtypes, fresh=self._fresh)
        refuse_overflow(self.item, new.values())
        return {**old, **new}

    def _old(self, role: str, start: int, stop: int, like: Tensor) -> Tensor:
        """Return the stored numbers of some rows' blocks: (blocks of rows, groups of columns)."""
        part, scheme = self._tensor.parts[role], self._scheme
        if role == "zero" and scheme.packed_zeros:
            words = self._parts.rows(
                as_bytes_of(part, part.shape[0]), start * scheme.bits // 32, -(-stop * scheme.bits // 32)
            )
            stream = words.view(len(words), -1, 4).transpose(0, 1).flatten(1)
            return unpack(stream, scheme.bits, stop - start).T.double() - (1 << scheme.bits - 1)
        matrix, inside = divmod(start, scheme.height)
        each = max(1, -(-scheme.height // scheme.rows))
        first = matrix * each + inside // scheme.rows
        raw = self._parts.rows(as_bytes_of(part, part.numel // like.shape[1]), first, first + len(like))
        return encoding.numbers_of(raw, part.dtype, scheme)

    def _codes(self, x: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """Return the codes of some rows, which begin with a block, a few rows at a time; x is overwritten."""
        row_bytes = self.item.nbytes // (self._tensor.numel // self._columns)
        codes = torch.empty((len(x), row_bytes), dtype=torch.uint8, device=x.device)
        height = max(1, CHUNK_ELEMENTS // self._columns)
        for first in range(0, len(x), height):
            part = x[first : first + height]
            block = torch.arange(first, first + len(part), device=x.device) // self._scheme.rows
            own = {role: each if len(each) == 1 else each.index_select(0, block) for role, each in numbers.items()}
            codes[first : first + len(part)] = encoding.encode(self._scheme, part, own, self._index, row_bytes)
        return codes

    def _stored(self, numbers: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Return the bytes of numbers, for all parts that are written."""
        pieces = {}
        for role, dtype in self._dtypes.items():
            if role == "zero" and self._scheme.packed_zeros:
                pieces[role] = self._packed_zeros(numbers[role], stop - start)
            else:
                pieces[role] = encoding.stored(numbers[role], dtype, self._scheme)
        return pieces

    def _packed_zeros(self, zeros: Tensor, count: int) -> Tensor:
        bits = self._scheme.bits
        codes = (zeros.T + (1 << bits - 1)).to(torch.uint8)
        stream = packed(codes.contiguous(), bits, -(-count * bits // 32) * 4)
        return stream.view(len(stream), -1, 4).transpose(0, 1).contiguous().flatten(1)


def _cut(x: Tensor, height: int) -> Iterator[Tensor]:
    """Yield the rows of a matrix, at most so many at a time."""
    for first in range(0, len(x), height):
        yield x[first : first + height]
