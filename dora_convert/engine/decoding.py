"""Read rows of coded tensors: their parts come from files, values are decoded on the device, a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codecs.coded import CHUNK_ELEMENTS, STRIP_BYTES, CodedTensor
from ..storage.reader import PIECE_BYTES, Reader
from ..storage.safetensors import StoredTensor

SMALL = 1 << 16
"""Bytes of a part that is read whole and kept, such as a table or the order of inputs."""
WORDS = 16
"""Bytes that strips are multiples of, so that words stay whole."""
TOGETHER = 8
"""Rows that some layouts have in one word: chunks end with a word."""
MOST_STRIPS = 3 * STRIP_BYTES // 2
"""Bytes of strips that are kept."""
NEAR = 8
"""Whole rows are read if they are at most so many times as long as a strip's."""
MOST = 8
"""Such parts that are kept."""


FREED = 4 << 20
"""Bytes of a tensor that is freed at once: afterwards glibc keeps as much again for the next tensors."""


def keep_freed_memory() -> None:
    """Let the C library keep the pages of temporary tensors, up to twice FREED for each thread.

    glibc gives freed pages back at once until a program has freed larger tensors. Steps between code and value would
    wait for fresh pages half of their time.
    """
    torch.empty(FREED, dtype=torch.uint8)


class StoredParts:
    """Parts of coded tensors, as bytes on a device.

    A row of some weights is a column on disk. Then a strip of columns is read at once and kept: rows that follow
    each other come from one strip.
    """

    def __init__(self, reader: Reader, device: torch.device) -> None:
        keep_freed_memory()
        self._reader, self._device = reader, device
        self._strips: dict[tuple[Path, int], tuple[int, int, Tensor]] = {}
        self.held: dict[tuple[Path, int], Any] = {}
        self._tables: dict[tuple[Path, int], Tensor] = {}

    def rows(self, part: StoredTensor, start: int, stop: int) -> Tensor:
        """Return rows of a part, seen as a matrix of bytes: uint8 (stop − start, bytes of a row)."""
        if part.nbytes > SMALL or (start, stop) != (0, part.shape[0]):
            return self._read(part, start, stop).to(self._device)
        place = (part.path, part.start)
        if place not in self._tables:
            if len(self._tables) >= MOST:
                self._tables.clear()
            self._tables[place] = self._read(part, start, stop).to(self._device)
        return self._tables[place]

    def columns(self, part: StoredTensor, start: int, stop: int) -> Tensor:
        """Return bytes `start` to `stop` of every row of a part: uint8 (rows, stop − start)."""
        place = (part.path, part.start)
        first, last, strip = self._strips.get(place, (0, 0, None))
        if strip is None or start < first or stop > last or len(strip) != part.shape[0]:
            first, last, strip = self._strip(part, start, stop)
            self._strips.pop(place, None)
            self._strips[place] = (first, last, strip)
            while len(self._strips) > 1 and sum(kept[2].numel() for kept in self._strips.values()) > MOST_STRIPS:
                self._strips.pop(next(iter(self._strips)))
        return strip[:, start - first : stop - first].to(self._device)

    def _strip(self, part: StoredTensor, start: int, stop: int) -> tuple[int, int, Tensor]:
        """Read bytes of every row, from `start` on; more than asked for, if the strip is small then."""
        height, width = part.shape
        last = min(width, max(stop, start + STRIP_BYTES // max(1, height) // WORDS * WORDS))
        if (start, last) == (0, width):
            return start, last, self._read(part, 0, height)
        length = last - start
        if width > NEAR * length:
            data = bytearray(height * length)
            runs = [(part.start + row * width + start, length) for row in range(height)]
            self._reader.gather(part.path, runs, data)
            return start, last, torch.frombuffer(data, dtype=torch.uint8).view(height, length)
        strip = torch.empty(height, length, dtype=torch.uint8)
        rows = max(1, PIECE_BYTES // width)
        for first in range(0, height, rows):  # a read of many rows takes less time than a read of each
            strip[first : first + rows] = self._read(part, first, min(height, first + rows))[:, start:last]
        return start, last, strip

    def _read(self, part: StoredTensor, start: int, stop: int) -> Tensor:
        width = part.shape[1]
        data = bytearray((stop - start) * width)
        self._reader.read(part.path, part.start + start * width, memoryview(data))
        return torch.frombuffer(data, dtype=torch.uint8).view(-1, width)


def decode(tensor: StoredTensor, parts: StoredParts, start: int, out: Tensor) -> Tensor:
    """Fill `out` with rows of a coded tensor's matrix, from `start` on, and return it."""
    assert isinstance(tensor, CodedTensor)
    columns, rows = tensor.columns, tensor.matrix
    narrow = rows[1] // max(1, columns)  # rows of the scheme in one row of the matrix
    lines = out.view(-1, columns)
    height = max(1, CHUNK_ELEMENTS // max(1, columns))
    height, first = height - height % TOGETHER if height > TOGETHER else height, 0
    while first < len(lines):
        begin = start * narrow + first
        part = lines[first : first + height - (begin % TOGETHER if height > TOGETHER else 0)]
        tensor.scheme.fill(tensor, parts, begin, part)
        first += len(part)
    return out


def decoded_rows(reader: Reader, tensor: StoredTensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of a coded tensor's matrix in float64, in host memory."""
    parts = StoredParts(reader, torch.device("cpu"))
    out = torch.empty((len(rows), tensor.matrix[1]), dtype=torch.float64)
    first = 0
    while first < len(rows):
        last = first + 1
        while last < len(rows) and rows[last] == rows[last - 1] + 1:
            last += 1
        decode(tensor, parts, rows[first], out[first:last])
        first = last
    return out
