"""Pack integers that are mostly zero into few bytes: the rounding loss, counted in ulps.

Each block is packed by itself. A sparse block holds the gaps between its non-zeros, then the non-zeros byte
plane by byte plane. A dense block holds all of its integers. Each stream is one zstd frame: the entropy coder
comes close to the information in the numbers. The head of a block holds its length, the count of integers,
the count of kept integers, and the lengths of the frames.
"""

from __future__ import annotations

import struct

import torch
import zstandard
from torch import Tensor

from ..engine.precision import as_bytes
from ..errors import MalformedError
from ..storage.reader import ROWS_MULTIPLE, Reader
from ..storage.safetensors import StoredTensor

LEVEL = 3
SPARSE = 6
"""A block is sparse if at most one integer in so many is not zero."""
ALL = 0xFFFFFFFF
"""The count of kept integers in the head of a dense block."""
LONGEST = 255
MOST = 1 << 22
"""The most integers of a block, unless its least rows hold more: eight times those of a packed block."""


def pack(values: Tensor) -> bytes:
    """Return a block of integers of any size, flattened, as bytes."""
    values = values.flatten()
    nonzero = values.nonzero().flatten()
    sparse = len(nonzero) * SPARSE <= len(values)
    streams = [_gaps(nonzero), *_planes(_zigzag(values[nonzero]))] if sparse else _planes(_zigzag(values))
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
    frames = [compressor.compress(as_bytes(stream)) for stream in streams] if len(nonzero) else []
    head = struct.pack(
        f"<IIB{len(frames)}I", len(values), len(nonzero) if sparse else ALL, len(frames), *map(len, frames)
    )
    body = head + b"".join(frames)
    return struct.pack("<I", len(body)) + body


def unpack(body: memoryview, dtype: torch.dtype) -> Tensor:
    """Return the integers of one packed block, without its length; ValueError for a malformed block."""
    count, kept, number = struct.unpack_from("<IIB", body)
    lengths = struct.unpack_from(f"<{number}I", body, 9)
    held = count if kept == ALL else kept
    planes = dtype.itemsize if held else 0
    if held > count or number != planes + (0 < held == kept) or sum(lengths) != len(body) - 9 - 4 * number:
        raise ValueError(f"{number} frames for {kept} of {count} integers")
    streams, position = [], 9 + 4 * number
    for k, length in enumerate(lengths):
        frame = body[position : position + length]
        streams.append(_decompress(frame, held, held + (count // LONGEST if k < number - planes else 0)))
        position += length
    values = torch.zeros(count, dtype=dtype)
    if kept == ALL:
        values.copy_(_unzigzag(_joined(streams, dtype)))
    elif kept:
        values[_positions(streams[0])] = _unzigzag(_joined(streams[1:], dtype))
    return values


def _decompress(frame: memoryview, least: int, most: int) -> Tensor:
    """Return the bytes of one frame; ValueError unless it declares from `least` to `most` bytes."""
    size = zstandard.frame_content_size(frame)
    if not least <= size <= most:
        raise ValueError(f"a frame of {size} bytes for {least} integers")
    data = bytearray(zstandard.ZstdDecompressor().decompress(frame))
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


class Unpacker:
    """Reads the packed integers of a stored tensor in order, however the blocks were cut."""

    def __init__(self, stored: StoredTensor, reader: Reader, dtype: torch.dtype, columns: int = 1) -> None:
        """Begin with the first integer; `columns` is the row length of the tensor behind the integers."""
        self._stored, self._reader, self._position = stored, reader, 0
        self._most = max(MOST, ROWS_MULTIPLE * columns)
        self._dtype, self._rest = dtype, torch.empty(0, dtype=dtype)

    def next(self, count: int) -> Tensor:
        """Return the next integers; raise MalformedError if the tensor is damaged or ends."""
        while len(self._rest) < count:
            self._rest = torch.cat([self._rest, self._block()])
        values, self._rest = self._rest[:count], self._rest[count:]
        return values

    def _block(self) -> Tensor:
        (length,) = struct.unpack("<I", self._take(4))
        try:
            if length > 10 * self._most + (1 << 16):
                raise ValueError(f"a block of {length} bytes")  # noqa: TRY301 - as for any other damage
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
    """Map 0, −1, 1, −2, … to 0, 1, 2, 3, …: small numbers of either sign get few bits."""
    return (values << 1) ^ (values >> (8 * values.element_size() - 1))


def _unzigzag(values: Tensor) -> Tensor:
    return ((values >> 1) & torch.iinfo(values.dtype).max) ^ -(values & 1)


def _planes(values: Tensor) -> list[Tensor]:
    """Return the lowest bytes of all values, then the next bytes, and so on."""
    bytes_ = values.contiguous().view(torch.uint8).view(-1, values.element_size())
    return [bytes_[:, k].contiguous() for k in range(values.element_size())]


def _joined(planes: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack(planes, dim=1).contiguous().view(dtype).flatten()


def _gaps(positions: Tensor) -> Tensor:
    """Return the number of zeros before each position, in bytes; a byte of 255 goes on in the next byte."""
    gaps = torch.diff(positions, prepend=torch.tensor([-1])) - 1
    ends = torch.cumsum(gaps // LONGEST + 1, 0) - 1
    coded = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), LONGEST, dtype=torch.uint8)
    coded[ends] = (gaps % LONGEST).to(torch.uint8)
    return coded


def _positions(coded: Tensor) -> Tensor:
    """Return the positions that `_gaps` coded."""
    ends = (coded != LONGEST).nonzero().flatten()
    return torch.cumsum(coded.long(), 0)[ends] + torch.arange(len(ends))
