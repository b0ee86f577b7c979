"""Spool tensors while a run computes them, and lay them out as a safetensors file at the end."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from xxhash import xxh3_128

from ..errors import Fault, MalformedError
from .json_files import Count, Dtype
from .reader import PIECE_BYTES, Reader, read_whole
from .safetensors import BITS, StoredTensor, encode_header


class Segment(NamedTuple):
    """A range of bytes of the spool."""

    start: Count
    length: Count


class SpooledTensor(NamedTuple):
    """One tensor of the file to be: its entry in the header, and the segments that hold its bytes."""

    name: str
    dtype: Dtype
    shape: tuple[Count, ...]
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in all segments."""
        return sum(segment.length for segment in self.segments)

    @property
    def whole(self) -> bool:
        """True if the segments are as long as dtype and shape say."""
        return math.prod(self.shape) * BITS[self.dtype] == 8 * self.nbytes

    @property
    def end(self) -> int:
        """The byte of the spool after the last segment."""
        return max((sum(segment) for segment in self.segments), default=0)


class Spool:
    """An append-only file that any thread may add to."""

    def __init__(self, path: Path, end: int = 0) -> None:
        """Create a spool, or open the first `end` bytes of an unfinished run's."""
        self.path = path
        if end and (not path.exists() or path.stat().st_size < end):
            raise MalformedError(f"{path} is shorter than its journal says.", hint="remove it and begin again")
        self._file = path.open("r+b" if end else "w+b")
        self._file.truncate(end)
        self._file.seek(end)
        self._lock = threading.Lock()
        self._end = end

    def add(self, data: bytes | memoryview) -> Segment:
        """Append bytes; return the segment that holds them."""
        with self._lock:
            self._file.seek(self._end)
            self._file.write(data)
            self._file.flush()
            segment = Segment(self._end, len(data))
            self._end += len(data)
        return segment

    def add_file(self, path: Path, name: str) -> SpooledTensor:
        """Append a file's bytes; return them as a tensor of bytes."""
        with path.open("rb") as file:
            pieces = tuple(self.add(piece) for piece in iter(partial(file.read, PIECE_BYTES), b"")) or (self.add(b""),)
        return SpooledTensor(name, "U8", (sum(piece.length for piece in pieces),), pieces)

    def lay_out(
        self, tensors: Sequence[SpooledTensor], path: Path, metadata: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Write tensors as a safetensors file, in the order given; return the xxh3-128 of each tensor."""
        digests: dict[str, str] = {}
        with path.open("wb") as file, self.path.open("rb", buffering=PIECE_BYTES) as spooled:
            file.write(encode_header(tensors, metadata))
            for tensor in tensors:
                digest = xxh3_128()
                for start, length in tensor.segments:
                    for piece in _pieces(spooled, start, length):
                        file.write(piece)
                        digest.update(piece)
                digests[tensor.name] = digest.hexdigest()
        return digests

    def close(self) -> None:
        """Close the file, which stays on the disk."""
        self._file.close()


def _pieces(file: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    """Yield a range of a file's bytes; neighbouring ranges come from one call of the system."""
    if file.tell() != start:
        file.seek(start)
    while length:
        if not (piece := file.read(min(length, PIECE_BYTES))):
            raise MalformedError(f"{file.name} became shorter while it was read.")
        length -= len(piece)
        yield piece


def gather(tensors: Sequence[StoredTensor]) -> bytes:
    """Return stored tensors, of any files, as the bytes of one safetensors file."""
    return b"".join([encode_header(tensors), *map(read_whole, tensors)])


def damaged_tensors(digests: Mapping[str, str], tensors: Mapping[str, StoredTensor], reader: Reader) -> list[Fault]:
    """Return a fault for each tensor that is missing, or whose xxh3-128 is not the one that was written."""
    return [
        Fault(name, "is not what was written" if name in tensors else "is missing")
        for name, digest in digests.items()
        if name not in tensors or reader.digest(tensors[name]).fast != digest
    ]
