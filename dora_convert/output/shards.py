"""Shard files of an output: header first, bodies at their offsets in any order and from any thread."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ..plan.item import Item
from ..plan.plan import Plan
from ..plan.sharding import header_bytes
from ..storage.reader import Reader

COPY_BYTES = 64 << 20
SLICE_BYTES = 1 << 20
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}
_BINARY = getattr(os, "O_BINARY", 0)


class Copy(NamedTuple):
    """A range of bytes to copy: from a file at an offset, to a shard at an offset."""

    path: Path
    source: int
    shard: str
    target: int
    length: int

    def reaches(self, other: Copy) -> bool:
        """Whether the other range begins where this one ends, on both sides."""
        end = self._replace(source=self.source + self.length, target=self.target + self.length)
        return end[:4] == other[:4]

    def pieces(self) -> Iterator[Copy]:
        """The range cut to pieces that workers can share."""
        for done in range(0, self.length, COPY_BYTES):
            length = min(COPY_BYTES, self.length - done)
            yield Copy(self.path, self.source + done, self.shard, self.target + done, length)


def shards_exist(folder: Path, plan: Plan) -> bool:
    """Whether every shard of a plan is in a folder, at its full size."""
    return all(
        (folder / shard.filename).is_file()
        and (folder / shard.filename).stat().st_size
        == len(header_bytes(shard)) + sum(item.nbytes for item in shard.items)
        for shard in plan.shards
    )


class ShardFiles:
    """The open shards of a plan, in a folder."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        create: bool,
        sparse: bool = False,
        places: Mapping[str, int] | None = None,
    ) -> None:
        """Open every shard; where they are to be created, write its header, take its space and sync it.

        `sparse` ones take space only as they are filled. `places` are where tensors begin in files that are there
        already, and not of our making.
        """
        self._folder, self._heads = folder, {shard.filename: header_bytes(shard) for shard in plan.shards}
        self._files: dict[str, int] = {}
        self._start: dict[str, tuple[str, int]] = {}
        self._seeking = threading.Lock()
        for shard in plan.shards:
            header = self._heads[shard.filename]
            position = len(header)
            for item in shard.items:
                self._start[item.name] = (shard.filename, places[item.name] if places else position)
                position += item.nbytes
            flags = os.O_RDWR | _BINARY | (os.O_CREAT | os.O_EXCL if create else 0)
            self._files[shard.filename] = descriptor = os.open(folder / shard.filename, flags, 0o666)
            if create:
                os.ftruncate(descriptor, position) if sparse else _allocate(descriptor, position)
                self._write(descriptor, 0, memoryview(header))
                os.fsync(descriptor)

    def descriptor(self, shard: str) -> int:
        """The open file of a shard."""
        return self._files[shard]

    def hollow(self, shard: str) -> None:
        """Give a shard's space back; its size and its header stay, for a later run to see that it was made."""
        descriptor = self._files[shard]
        size = os.fstat(descriptor).st_size
        os.ftruncate(descriptor, 0)
        os.ftruncate(descriptor, size)
        self._write(descriptor, 0, memoryview(self._heads[shard]))

    def shard_of(self, item: Item) -> str:
        """The shard a tensor lies in."""
        return self._start[item.name][0]

    def write(self, item: Item, offset: int, data: memoryview) -> None:
        """Put bytes of a tensor at an offset inside it."""
        shard, start = self._start[item.name]
        self._write(self._files[shard], start + offset, data)

    if hasattr(os, "pwrite"):

        def _write(self, descriptor: int, position: int, data: memoryview) -> None:
            # One large write per block costs twice as much as slices of it (docs/performance.md).
            while len(data):
                done = os.pwrite(descriptor, data[:SLICE_BYTES], position)
                data, position = data[done:], position + done

    else:  # Windows has no positional write

        def _write(self, descriptor: int, position: int, data: memoryview) -> None:
            with self._seeking:
                os.lseek(descriptor, position, os.SEEK_SET)
                while len(data):
                    data = data[os.write(descriptor, data[:SLICE_BYTES]) :]

    def copies(self, plan: Plan) -> Iterator[Copy]:
        """What to copy as bytes; neighbours are joined, long runs cut into pieces."""
        run: Copy | None = None
        for item in plan.items:
            if not item.verbatim or not item.nbytes:
                continue
            place = self._start[item.name]
            if item.source.path == self._folder / place[0]:
                continue  # it is where it belongs
            copy = Copy(item.source.path, item.source.start, *place, item.nbytes)
            if run and run.reaches(copy):
                run = run._replace(length=run.length + copy.length)
                continue
            if run:
                yield from run.pieces()
            run = copy
        if run:
            yield from run.pieces()

    def copy(self, copy: Copy, reader: Reader) -> None:
        """Copy a range of a file's bytes, inside the kernel where that works."""
        path, source, shard, target, length = copy
        descriptor = self._files[shard]
        if hasattr(os, "copy_file_range"):
            origin = reader.descriptor(path)
            try:
                while length and (done := os.copy_file_range(origin, descriptor, length, source, target)):
                    source, target, length = source + done, target + done, length - done
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
        for piece in reader.span(path, source, length):
            self._write(descriptor, target, piece)
            target += len(piece)

    def close(self) -> None:
        """Close every shard."""
        while self._files:
            os.close(self._files.popitem()[1])


def _allocate(descriptor: int, size: int) -> None:
    """Size a file and take its space now: faster than growing it, and a full disk shows at once."""
    os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
