"""Find numbers in the parts of a coded tensor by their bits: where each begins, and how many it has.

A position has two parts: the first bit of a row, and the bits from there on. Rows have the latter in common, so most
of the work is done once for all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codecs.coded import CodedTensor
from ..storage.reader import Reader
from ..storage.safetensors import BITS, StoredTensor
from .bit_numbers import number

SMALL = 1 << 16
"""Bytes of a part that is read whole and kept."""
NARROW = 16
"""So many bits, and those before them in a byte, fit an int32."""
START = torch.zeros(1, 1, dtype=torch.int64)
"""The first bit of a part that is one row."""


class StoredBits:
    """The bits of all parts of one coded tensor; keeps what it has read last."""

    def __init__(self, tensor: CodedTensor, reader: Reader) -> None:
        self._tensor, self._reader = tensor, reader
        self._held: dict[str, tuple[int, Tensor]] = {}
        self._lines: tuple[Tensor, Tensor] | None = None

    def numbers(self, role: str, first: Tensor, inside: Tensor, dtype: str | None = None) -> Tensor:
        """Return elements of a part: element `inside` (columns,), counted from the `first` (rows, 1) of each row."""
        stored = self._tensor.parts[role].dtype
        bits = self.whole(role, first * BITS[stored], inside * BITS[stored], BITS[stored])
        return number(bits, dtype or stored)

    def hold(self, role: str, first: Tensor, nbytes: int) -> None:
        """Read so many bytes of each row at once, for all later questions about the same `first` bits."""
        part, begin = self._tensor.parts[role], first.flatten() // 8
        self._lines = first, self._gathered(part, begin, nbytes)

    def whole(self, role: str, first: Tensor, inside: Tensor, count: int) -> Tensor:
        """Return whole numbers of `count` bits, the low bits first: int32 or int64 (rows, columns).

        `first` holds a bit of each row, (rows, 1); `inside` the bits from there on, (columns,) or (rows, columns).
        """
        if bool((rest := first & 7).any()):
            first, inside = first - rest, inside + rest
        byte, bit = inside >> 3, inside & 7
        low, most = int(inside.min()) >> 3, int(bit.max())
        data, begin = self._bytes(role, first, low, (int(inside.max()) + count + 7 >> 3) - low)
        place = begin + byte
        value = picked(data, place)
        value = value.int() if count <= NARROW else value.long()
        for k in range(1, most + count + 7 >> 3):
            value |= picked(data, (place + k).clamp_(max=len(data) - 1)).to(value.dtype) << 8 * k
        if most:
            value >>= bit.to(value.dtype)
        return value.bitwise_and_((1 << count) - 1) if count not in (8, 64) or most else value

    def _bytes(self, role: str, first: Tensor, low: int, width: int) -> tuple[Tensor, Tensor]:
        """Return bytes of a part in one line, and the place there of each row's `first` bit: (rows, 1)."""
        part, begin = self._tensor.parts[role], first >> 3
        if self._lines and self._lines[0] is first:
            wide = len(self._lines[1]) // len(first)
            return self._lines[1], torch.arange(len(first))[:, None] * wide
        start, stop = int(begin.min()) + low, int(begin.max()) + low + width
        if len(first) > 1 and part.nbytes > SMALL and 4 * len(first) * width < stop - start:
            data = self._gathered(part, begin.flatten() + low, width)
            return data, torch.arange(len(first))[:, None] * width - low
        data, start = self._span(role, part, start, stop)
        return data, begin - start

    def _gathered(self, part: StoredTensor, begin: Tensor, width: int) -> Tensor:
        """Return runs of bytes of a part, one after the other."""
        data = bytearray(len(begin) * width)
        self._reader.gather(part.path, [(part.start + start, width) for start in begin.tolist()], data)
        return torch.frombuffer(data, dtype=torch.uint8)

    def _span(self, role: str, part: StoredTensor, first: int, last: int) -> tuple[Tensor, int]:
        """Return bytes of a part, and the number of the first; columns keep all bytes of one expert."""
        start, held = self._held.get(role, (0, torch.empty(0, dtype=torch.uint8)))
        if start <= first and last <= start + len(held):
            return held, start
        unit = part.nbytes // (part.shape[0] if len(part.shape) > 2 else 1)
        if 2 * (last - first) > unit or unit <= SMALL:
            first, last = first // unit * unit, -(-last // unit) * unit
        data = bytearray(last - first)
        self._reader.read(part.path, part.start + first, memoryview(data))
        self._held[role] = (first, torch.frombuffer(data, dtype=torch.uint8))
        return self._held[role][1], first


def picked(values: Tensor, index: Tensor) -> Tensor:
    """Return values, (n,), by their indices; this is several times faster than values[index]."""
    return values.index_select(0, index.flatten()).view(index.shape)


def spread(numbers: Tensor, group: Tensor | int, columns: int) -> Tensor:
    """Return numbers of rows, (rows, groups), for each column: by its group, or by the columns of all groups."""
    rows, groups = numbers.shape
    if groups == 1:
        return numbers
    if isinstance(group, int):
        return numbers.repeat_interleave(group, dim=1)[:, :columns]
    return picked(numbers.flatten(), torch.arange(rows)[:, None] * groups + group)
