"""Write the shard files of an output: headers first, then tensors in any order, from any thread."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..plan.item import Item
from ..plan.plan import Plan
from ..storage.journal import Background, sync_path
from ..storage.reader import OpenFiles, Reader
from ..storage.safetensors import encode_header

COPY_BYTES = 64 << 20
SLICE_BYTES = 1 << 19
"""Bytes of one write. Larger ones make the system look for larger pieces of memory, which it often has not at hand."""
UNCACHED_SINCE = (6, 16)
"""The version of Linux from which the flag is used: it came with 6.14, whose first fixes are in by then."""
UNCACHED_SLICE = 1 << 20
"""The most bytes of one such write: more than that do not stay in a processor's cache on their way."""
LEAST_UNCACHED = 1 << 20
"""Smaller tensors are written to the page cache: the system writes many of them to the disk at once."""
PAGE = 1 << 16
"""A multiple of the size of a page on every machine."""
QUICK_SECONDS = 0.1
"""Most file systems allocate a model's space in this time; others need as long as for writing it."""
_NO_FLAG = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_NO_SPACE_AHEAD = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


def _uncached() -> int:
    """Return the flag RWF_DONTCACHE if this Linux has it: write to the disk at once, and forget the pages then."""
    if sys.platform != "linux" or not hasattr(os, "pwritev"):
        return 0
    version = os.uname().release.replace("-", ".").split(".")[:2]
    return 0x80 if tuple(int(word) for word in version if word.isdigit()) >= UNCACHED_SINCE else 0


UNCACHED = _uncached()


class Copy(NamedTuple):
    """A range of bytes to copy from an offset of a file to an offset of a shard."""

    path: Path
    source: int
    shard: str
    target: int
    length: int

    def reaches(self, other: Copy) -> bool:
        """Return True if the other range begins where this range ends, on both sides."""
        end = self._replace(source=self.source + self.length, target=self.target + self.length)
        return end[:4] == other[:4]

    def pieces(self) -> Iterator[Copy]:
        """Yield the range in pieces that workers can share."""
        for done in range(0, self.length, COPY_BYTES):
            length = min(COPY_BYTES, self.length - done)
            yield Copy(self.path, self.source + done, self.shard, self.target + done, length)


class ShardFiles:
    """The shards of a plan, in a folder."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        create: bool,
        sparse: bool = False,
        cached: bool = True,
        starts: Mapping[str, int] | None = None,
    ) -> None:
        """Take the shards that exist; with `create`, write the headers and sync, and begin to allocate the space.

        `sparse` shards take space only as they are filled. `starts` are the offsets of tensors in files that
        other tools wrote. Unless `cached`, large tensors leave the page cache as soon as they are on the disk.
        """
        self._cached, self._flags = cached, UNCACHED
        self._tails: dict[str, tuple[int, bytes]] = {}
        """The last bytes of tensors at work, which do not fill a page, and their offsets in the shards."""
        self._folder = folder
        self._heads = {
            shard.filename: encode_header(shard.items, shard.metadata, shard.prefix) for shard in plan.shards
        }
        self._known: dict[str, Path] = {}
        """The paths that were asked for: it takes longer to make one than to look it up."""
        self._paths = {self.path(name) for name in self._heads}
        self._files = OpenFiles(os.O_RDWR)
        self._start: dict[str, tuple[str, int]] = {}
        self._seeking = threading.Lock()
        self._allocation = Background("allocate", self._allocate_each)
        for shard in plan.shards:
            position = len(self._heads[shard.filename])
            for item in shard.items:
                self._start[item.name] = (shard.filename, starts[item.name] if starts else position)
                position += item.nbytes
            if create:
                self._create(shard.filename, position)
                if not sparse:
                    self._allocation.put((shard.filename, position))

    def _create(self, shard: str, size: int) -> None:
        """Create a shard of its full size, with its header, and sync it."""
        self.path(shard).parent.mkdir(exist_ok=True)
        self.path(shard).touch(exist_ok=False)
        with self._files.using(self.path(shard)) as descriptor:
            os.ftruncate(descriptor, size)
            self._write(descriptor, 0, memoryview(self._heads[shard]))
            os.fsync(descriptor)

    def _allocate_each(self, sizes: list[tuple[str, int]]) -> None:
        """Allocate the space of shards; a write that comes before is as good."""
        for shard, size in sizes:
            with self._files.using(self.path(shard)) as descriptor:
                _allocate(descriptor, size)

    def check(self, wait: float = 0.0) -> None:
        """Raise the error of the allocation, if it has failed so far, or fails while so many seconds are waited."""
        self._allocation.idle(wait) if wait else self._allocation.check()

    def fits(self, plan: Plan) -> bool:
        """Return True if these shards are those of a plan."""
        return self._heads == {
            each.filename: encode_header(each.items, each.metadata, each.prefix) for each in plan.shards
        }

    def path(self, shard: str) -> Path:
        """Return the path of a shard."""
        if not (path := self._known.get(shard)):
            path = self._known[shard] = self._folder / shard
        return path

    def hollow(self, shard: str) -> None:
        """Free a shard's space; size and header stay, so that a later run sees that the shard was written."""
        with self._files.using(self.path(shard)) as descriptor:
            size = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, size)
            self._write(descriptor, 0, memoryview(self._heads[shard]))

    def shard_of(self, item: Item) -> str:
        """Return the name of the shard that holds a tensor."""
        return self._start[item.name][0]

    def write(self, item: Item, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor at an offset inside the tensor."""
        shard, start = self._start[item.name]
        self._allocation.check()
        with self._files.using(self.path(shard)) as descriptor:
            if self._leaves(item):
                last = offset + len(data) == item.nbytes
                self._write_pages(item.name, descriptor, start + offset, data, last=last)
            else:
                self._write(descriptor, start + offset, data)

    def _leaves(self, item: Item) -> bool:
        """Return True if a tensor leaves the page cache as soon as it is on the disk."""
        return bool(UNCACHED) and not self._cached and item.nbytes >= LEAST_UNCACHED

    def write_whole(self, items: Sequence[Item], data: memoryview) -> None:
        """Write whole tensors of one size, whose bytes follow each other; neighbours in a shard at once."""
        places, size, first = [self._start[item.name] for item in items], items[0].nbytes, 0
        alone = self._leaves(items[0])
        for last, (shard, start) in enumerate(places, start=1):
            if last == len(items) or alone or places[last] != (shard, start + size):
                self.write(items[first], 0, data[first * size : last * size])
                first = last

    def _write_pages(self, name: str, descriptor: int, position: int, data: memoryview, *, last: bool) -> None:
        """Write the whole pages of a tensor's next bytes; the rest waits, or it would be read back from the disk."""
        start, tail = self._tails.pop(name, (position, b""))
        if start + len(tail) != position:  # a tensor that is begun again
            self._write(descriptor, start, memoryview(tail))
            start, tail = position, b""
        end = position + len(data)
        whole = end if last else max(start, end - end % PAGE)
        if whole <= position < end:
            self._tails[name] = (start, tail + data)
            return
        if whole < end:
            self._tails[name] = (whole, bytes(data[whole - position :]))
        self._write_uncached(descriptor, start, tail, data[: whole - position])

    def _write_uncached(self, descriptor: int, position: int, tail: bytes, data: memoryview) -> None:
        """Write bytes in two pieces, past the page cache if the system can."""
        while tail or len(data):
            room = max(0, UNCACHED_SLICE - position % PAGE - len(tail))
            try:
                done = os.pwritev(descriptor, [tail, data[:room]], position, self._flags)
            except OSError as error:
                if not self._flags or error.errno not in _NO_FLAG:
                    raise
                self._flags = 0
                continue
            position += done
            data, tail = data[max(0, done - len(tail)) :], tail[done:]

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
        """Yield the ranges to copy as bytes: neighbours are joined, long runs cut into pieces."""
        run: Copy | None = None
        for item in plan.items:
            if not item.verbatim or not item.nbytes:
                continue
            shard, start = self._start[item.name]
            if item.source.path == self._folder / shard:
                continue  # in place: nothing to copy
            copy = Copy(item.source.path, item.source.start, shard, start, item.nbytes)
            if run and run.reaches(copy):
                run = run._replace(length=run.length + copy.length)
                continue
            if run:
                yield from run.pieces()
            run = copy
        if run:
            yield from run.pieces()

    def copy(self, copy: Copy, reader: Reader) -> None:
        """Copy a range of a file's bytes, inside the kernel if the system can."""
        path, source, shard, target, length = copy
        if reader.is_remote(path):
            with self._files.using(self.path(shard)) as descriptor:
                for piece in reader.span(path, source, length):
                    self._write(descriptor, target, piece)
                    target += len(piece)
            return
        with reader.using(path) as file, self._files.using(self.path(shard)) as descriptor:
            if hasattr(os, "copy_file_range"):
                try:
                    while length and (done := os.copy_file_range(file, descriptor, length, source, target)):
                        source, target, length = source + done, target + done, length - done
                except OSError as error:
                    if error.errno not in _NO_KERNEL_COPY:
                        raise
            for piece in reader.span(path, source, length):
                self._write(descriptor, target, piece)
                target += len(piece)

    def sync(self, path: Path) -> None:
        """Sync a file; of a shard, let go the pages that are still in the page cache."""
        sync_path(path, forget=not self._cached and path in self._paths)

    def close(self) -> None:
        """Close every shard."""
        self._allocation.stop(wait=True)
        self._files.close()


def _allocate(descriptor: int, size: int) -> None:
    """Allocate a file's space now: faster than growing it, and a full disk shows at once.

    Some file systems cannot do it. There the C library's `posix_fallocate` writes a byte into every block, which
    takes as long as writing the file. Linux's own call refuses instead.
    """
    try:
        if sys.platform == "linux" and size:
            _fallocate(descriptor, size)
        elif hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _NO_SPACE_AHEAD:
            raise


def _fallocate(descriptor: int, size: int) -> None:
    """Call Linux's fallocate; raises OSError, with EOPNOTSUPP on file systems that cannot do it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None:  # a C library without it
        return
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while call(descriptor, 0, 0, size):
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))
