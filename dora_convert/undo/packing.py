"""Integers that are mostly zero, as few bytes: what rounding lost, counted in ulps.

A block is packed by itself: where its few non-zeros are, as gaps between them, and what they are, byte by byte of
their size; or all of its integers, where most are not zero. Each of these is one zstd frame: its entropy coder then
comes close to what the numbers hold. Before each block stand its length, how many integers it has, how many of them
are kept, and the lengths of its frames.
"""

from __future__ import annotations

import struct

import torch
import zstandard
from torch import Tensor

from ..engine.memory import as_bytes
from ..errors import MalformedError
from ..plan.item import ROWS_MULTIPLE
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor

LEVEL = 3
SPARSE = 6
"""Where at most one integer in so many is not zero, only those are kept, and where they are."""
ALL = 0xFFFFFFFF
LONGEST = 255
MOST = 1 << 22
"""Integers in one block at the most, unless its least rows hold more: eight times what is packed."""


def pack(values: Tensor) -> bytes:
    """A block of integers of any size, flattened, as bytes."""
    values = values.flatten()
    places = values.nonzero().flatten()
    sparse = len(places) * SPARSE <= len(values)
    streams = [_gaps(places), *_planes(_zigzag(values[places]))] if sparse else _planes(_zigzag(values))
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
    frames = [compressor.compress(as_bytes(stream)) for stream in streams] if len(places) else []
    head = struct.pack(
        f"<IIB{len(frames)}I", len(values), len(places) if sparse else ALL, len(frames), *map(len, frames)
    )
    body = head + b"".join(frames)
    return struct.pack("<I", len(body)) + body


def unpack(body: memoryview, dtype: torch.dtype) -> Tensor:
    """The integers of one packed block, without the length before it; ValueError where it holds something else."""
    count, kept, number = struct.unpack_from("<IIB", body)
    lengths = struct.unpack_from(f"<{number}I", body, 9)
    held = count if kept == ALL else kept
    planes = dtype.itemsize if held else 0
    if held > count or number != planes + (0 < held == kept) or sum(lengths) != len(body) - 9 - 4 * number:
        raise ValueError(f"{number} frames for {kept} of {count} integers")
    streams, position = [], 9 + 4 * number
    for place, length in enumerate(lengths):
        frame = body[position : position + length]
        streams.append(_unpacked(frame, held, held + (count // LONGEST if place < number - planes else 0)))
        position += length
    values = torch.zeros(count, dtype=dtype)
    if kept == ALL:
        values.copy_(_unzigzag(_joined(streams, dtype)))
    elif kept:
        values[_places(streams[0])] = _unzigzag(_joined(streams[1:], dtype))
    return values


def _unpacked(frame: memoryview, least: int, most: int) -> Tensor:
    """The bytes of one frame, which says itself how many they are; ValueError where it may not hold so many."""
    size = zstandard.frame_content_size(frame)
    if not least <= size <= most:
        raise ValueError(f"a frame of {size} bytes for {least} integers")
    data = bytearray(zstandard.ZstdDecompressor().decompress(frame))
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


class Unpacker:
    """The integers of a stored tensor, from its first on, however its blocks were cut."""

    def __init__(self, stored: StoredTensor, reader: Reader, dtype: torch.dtype, columns: int = 1) -> None:
        """`columns` is how long a row of the tensor is that the integers belong to."""
        self._stored, self._reader, self._position = stored, reader, 0
        self._most = max(MOST, ROWS_MULTIPLE * columns)
        self._dtype, self._rest = dtype, torch.empty(0, dtype=dtype)

    def next(self, count: int) -> Tensor:
        """The next so many integers; MalformedError where there are none such."""
        while len(self._rest) < count:
            self._rest = torch.cat([self._rest, self._block()])
        values, self._rest = self._rest[:count], self._rest[count:]
        return values

    def _block(self) -> Tensor:
        (length,) = struct.unpack("<I", self._take(4))
        try:
            if length > 10 * self._most + (1 << 16):
                raise ValueError(f"a block of {length} bytes")  # noqa: TRY301 - as whatever else is wrong with it
            body = self._take(length)
            (count,) = struct.unpack_from("<I", body)
            if not 0 < count <= self._most:
                raise ValueError(f"a block of {count} integers")  # noqa: TRY301
            return unpack(body, self._dtype)
        except (ValueError, RuntimeError, IndexError, struct.error, zstandard.ZstdError) as error:
            raise MalformedError(f"{self._stored.path}: {self._stored.name} is damaged.") from error

    def _take(self, length: int) -> memoryview:
        if self._position + length > self._stored.nbytes:
            raise MalformedError(f"{self._stored.path}: {self._stored.name} ends too early.")
        data = memoryview(bytearray(length))
        self._reader.read(self._stored.path, self._stored.start + self._position, data)
        self._position += length
        return data


def _zigzag(values: Tensor) -> Tensor:
    """0, −1, 1, −2, … as 0, 1, 2, 3, …: small numbers have few bits, whatever their sign."""
    return (values << 1) ^ (values >> (8 * values.element_size() - 1))


def _unzigzag(values: Tensor) -> Tensor:
    return ((values >> 1) & torch.iinfo(values.dtype).max) ^ -(values & 1)


def _planes(values: Tensor) -> list[Tensor]:
    """The lowest bytes of all values, then the next ones, and so on."""
    bytes_ = values.contiguous().view(torch.uint8).view(-1, values.element_size())
    return [bytes_[:, place].contiguous() for place in range(values.element_size())]


def _joined(planes: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack(planes, dim=1).contiguous().view(dtype).flatten()


def _gaps(places: Tensor) -> Tensor:
    """How many zeros stand before each place: bytes of 255 go on in the next byte."""
    gaps = torch.diff(places, prepend=torch.tensor([-1])) - 1
    ends = torch.cumsum(gaps // LONGEST + 1, 0) - 1
    coded = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), LONGEST, dtype=torch.uint8)
    coded[ends] = (gaps % LONGEST).to(torch.uint8)
    return coded


def _places(coded: Tensor) -> Tensor:
    ends = (coded != LONGEST).nonzero().flatten()
    return torch.cumsum(coded.long(), 0)[ends] + torch.arange(len(ends))
