"""The undo record: what a merge loses, kept beside the merged weights so that it can be taken out again.

`dora_convert/undo.safetensors` holds, for every output tensor that needs it,

    norm/<n>/<tensor>    F32 (out)         ‖W + sBA‖ of the n-th edit of a tensor: a DoRA merge cannot be undone without it
    rows/<tensor>        as in the base    the base's rows where an adapter's tensor replaced them and they differ
    index/<tensor>       I64 (rows)        which rows those are, of the tensor seen as (first dimension, all others)
    file/<name>          U8 (bytes)        a side file of the base that was edited, replaced or left out

How much that is becomes known while the merge runs, so parts go to a spool in any order and are laid out in the
plan's order at the end.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import MalformedError
from .safetensors import BITS, StoredTensor, encode_header

NAME = "undo.safetensors"
SPOOL = "undo.spool"


class Segment(NamedTuple):
    """A piece of the spool."""

    start: int
    length: int


class Part(NamedTuple):
    """One tensor of the record: its entry in the header, and where its bytes are in the spool."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def whole(self) -> bool:
        """Whether its pieces are as long as its dtype and shape say."""
        return math.prod(self.shape) * BITS[self.dtype] == 8 * sum(piece.length for piece in self.segments)

    @property
    def end(self) -> int:
        """Where its last piece ends in the spool."""
        return max((sum(segment) for segment in self.segments), default=0)


class Spool:
    """An append-only file that any thread may add to."""

    def __init__(self, path: Path, end: int = 0) -> None:
        """A new spool, or the first `end` bytes of one that an unfinished run has left."""
        self.path = path
        if end and (not path.exists() or path.stat().st_size < end):
            raise MalformedError(f"{path} is shorter than its journal says.", hint="begin again, without it")
        self._file = path.open("r+b" if end else "w+b")
        self._file.truncate(end)
        self._file.seek(end)
        self._lock = threading.Lock()
        self._end = end

    @property
    def descriptor(self) -> int:
        """The open file."""
        return self._file.fileno()

    def add(self, data: bytes | memoryview) -> Segment:
        """Append bytes and say where they are."""
        with self._lock:
            self._file.seek(self._end)
            self._file.write(data)
            self._file.flush()
            segment = Segment(self._end, len(data))
            self._end += len(data)
        return segment

    def lay_out(self, parts: Sequence[Part], path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the parts as a safetensors file, in the order given."""
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        for part in parts:
            length = sum(segment.length for segment in part.segments)
            entries[part.name] = {
                "dtype": part.dtype,
                "shape": list(part.shape),
                "data_offsets": [position, position + length],
            }
            position += length
        with path.open("wb") as record:
            record.write(encode_header(entries))
            for start, length in (segment for part in parts for segment in part.segments):
                self._file.seek(start)
                for done in range(0, length, 1 << 20):
                    record.write(self._file.read(min(length - done, 1 << 20)))

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()


def gathered(tensors: Sequence[StoredTensor]) -> bytes:
    """Stored tensors, from wherever they are, as one safetensors file."""
    entries: dict[str, object] = {}
    position, bodies = 0, []
    for stored in tensors:
        offsets = [position, position + stored.nbytes]
        entries[stored.name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": offsets}
        position += stored.nbytes
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            bodies.append(file.read(stored.nbytes))
    return encode_header(entries) + b"".join(bodies)


@dataclass
class ReplacedRows:
    """The base's rows that a replacement changes, as they are found."""

    spool: Spool
    index: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def add(self, rows: Iterable[int], data: bytes) -> None:
        """Keep some rows: their numbers, and their bytes in the same order."""
        if data:
            self.index.extend(rows)
            self.segments.append(self.spool.add(data))

    def parts(self, tensor: str, dtype: str, columns: int) -> list[Part]:
        """The record's tensors for these rows; none where nothing differs."""
        if not self.index:
            return []
        numbers = self.spool.add(struct.pack(f"<{len(self.index)}q", *self.index))
        return [
            Part(f"rows/{tensor}", dtype, (len(self.index), columns), tuple(self.segments)),
            Part(f"index/{tensor}", "I64", (len(self.index),), (numbers,)),
        ]
