"""Define the output of a run: a folder, its shard files, and the rules to enter and to resume it.

Shards are written headers first, then tensors in any order, from any thread.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import NumericalError, OutputError
from ..plan.item import Item
from ..plan.plan import Plan
from ..plan.sharding import header_bytes
from ..sizes import format_size
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import JOURNAL, RECORD
from ..storage.journal import JournalKey, UnfinishedRun, read_journal
from ..storage.reader import Reader
from .side_files import copy_or_write

COPY_BYTES = 64 << 20
SLICE_BYTES = 1 << 20
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}
_BINARY = getattr(os, "O_BINARY", 0)


class Output(ABC):
    """A folder that a run fills: an `OutputFolder` beside the base, or the base itself as `InPlace`."""

    WAY_OUT: str
    """The hint after an unfinished run of something else."""
    in_place = False
    """True if the run overwrites its own input, so that all errors must show before the first write."""
    overwrite = False
    """True if an unfinished run of something else may be removed."""
    given: str
    """OUT as the caller wrote it."""
    out: Path
    """OUT as an absolute path."""
    partial: Path
    """The folder that the weights are written into."""
    state: Path
    """The folder of journal and spool."""

    @abstractmethod
    def identity(self, bases: Sequence[Checkpoint]) -> Mapping[str, Any]:
        """Return JSON values that identify the bases among others with the same headers, without a read."""

    @abstractmethod
    def open(self) -> None:
        """Create the folder, or enter the one of an unfinished run, and lock it."""

    @abstractmethod
    def open_shards(self, plan: Plan, *, new: bool, sparse: bool = False) -> ShardFiles:
        """Open the files that tensors are written into."""

    @abstractmethod
    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove the files of an unfinished run, except the names in `keep`."""

    @abstractmethod
    def path(self, name: str) -> Path:
        """Return the path that a file beside the weights is written to."""

    @abstractmethod
    def sync(self) -> None:
        """Sync names and small files to the disk."""

    @abstractmethod
    def publish(self, report: Mapping[str, Any], removed: Sequence[str] = ()) -> None:
        """Give everything its final name; `removed` are files of the base that the result does not have."""

    @abstractmethod
    def leave(self) -> None:
        """Unlock, and keep everything for the same command to resume."""

    @abstractmethod
    def discard(self) -> None:
        """Unlock, and remove a run that is not worth resuming."""

    def prepare(self, item: Item, reader: Reader) -> Item:  # noqa: ARG002 - for outputs in place
        """Return the item with a source that is safe to read while the item is written."""
        return item

    def settled(self, item: Item) -> None:  # noqa: B027 - for outputs in place
        """Note that a tensor is written, synced and entered in the journal."""

    def bytes_needed(self, plan: Plan) -> int:
        """Return the bytes that a plan's weights take on the disk."""
        return plan.bytes_out

    def check_space(self, nbytes: int) -> None:
        """Refuse a disk without so many free bytes, less the bytes of an unfinished run."""
        parent = next(parent for parent in (self.out, *self.out.parents) if parent.exists())
        nbytes -= self._bytes_done()
        if (free := shutil.disk_usage(parent).free) < nbytes:
            raise OutputError(
                f"{parent} has {format_size(free)} free; the output needs {format_size(nbytes)}.",
                hint="free some space, or choose an OUT on another disk",
            )

    @property
    def begun(self) -> bool:
        """True if a run has begun to write and has not ended."""
        return (self.state / JOURNAL).exists()

    def _bytes_done(self) -> int:
        """Return the bytes that an unfinished run takes on the disk."""
        return 0

    def resumable(self, plan: Plan) -> bool:
        """Return True if all shards of a plan exist, at their full sizes."""
        for shard in plan.shards:
            path, nbytes = self.partial / shard.filename, sum(item.nbytes for item in shard.items)
            if not path.is_file() or path.stat().st_size != len(header_bytes(shard)) + nbytes:
                return False
        return True

    def put(self, name: str, source: bytes | Path) -> None:
        """Write a small file, or copy one; the umask decides its permissions."""
        copy_or_write(self.path(name), source)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Open and lock the output; after an error keep it if the same command can resume the run."""
        self.open()
        try:
            yield
        except BaseException as error:
            begun = self.begun
            left = self._abandon(keep=begun if isinstance(error, OSError) else not isinstance(error, NumericalError))
            if not isinstance(error, OSError):
                raise
            hints = [f"{self.partial} stays; rerun the same command to resume" if begun else "", left]
            raise OutputError(
                f"{self.out} cannot be written: {error.strerror or error}.",
                hint="; ".join(filter(None, hints)) or None,
                outcome="What is done is kept." if begun else None,
            ) from error

    def _abandon(self, *, keep: bool) -> str:
        """Leave or discard an output that failed; return the reason if even that fails."""
        try:
            self.leave() if keep else self.discard()
        except OSError as error:
            return f"{self.partial} could not be removed: {error.strerror or error}"
        return ""

    @contextmanager
    def tidied(self) -> Iterator[None]:
        """Say that the output is complete if the steps inside fail: they remove what nothing needs any more."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.out} is complete, but the cleanup after it failed: {error.strerror or error}.",
                hint=error.filename and f"{error.filename} is not needed any more",
                outcome="The output is complete.",
            ) from error

    def resume(
        self, key: JournalKey, keep: list[str], complete: Callable[[], bool], line_type: type
    ) -> UnfinishedRun | None:
        """Return the journal of an unfinished run with the same key, or None and an empty output.

        `keep` names the files that the run goes on with, `complete` says that all of them exist, and
        `line_type` is the type of the journal's lines.
        """
        path = self.state / JOURNAL
        unfinished = read_journal(path)
        if unfinished and unfinished.key == key and complete():
            self.clear(keep=[RECORD, *keep])
            return read_journal(path, line_type)
        if unfinished and unfinished.key != key and not self.overwrite:
            raise OutputError(f"{self.partial} holds an unfinished run of something else.", hint=self.WAY_OUT)
        self.clear()
        return None


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
    """The open shards of a plan, in a folder."""

    def __init__(
        self, folder: Path, plan: Plan, *, create: bool, sparse: bool = False, starts: Mapping[str, int] | None = None
    ) -> None:
        """Open every shard; with `create`, write the headers, allocate the space and sync.

        `sparse` shards take space only as they are filled. `starts` are the offsets of tensors in files that
        other tools wrote.
        """
        self._folder, self._heads = folder, {shard.filename: header_bytes(shard) for shard in plan.shards}
        self._files: dict[str, int] = {}
        self._start: dict[str, tuple[str, int]] = {}
        self._seeking = threading.Lock()
        for shard in plan.shards:
            header = self._heads[shard.filename]
            position = len(header)
            for item in shard.items:
                self._start[item.name] = (shard.filename, starts[item.name] if starts else position)
                position += item.nbytes
            flags = os.O_RDWR | _BINARY | (os.O_CREAT | os.O_EXCL if create else 0)
            self._files[shard.filename] = descriptor = os.open(folder / shard.filename, flags, 0o666)
            if create:
                os.ftruncate(descriptor, position) if sparse else _allocate(descriptor, position)
                self._write(descriptor, 0, memoryview(header))
                os.fsync(descriptor)

    def descriptor(self, shard: str) -> int:
        """Return the open file descriptor of a shard."""
        return self._files[shard]

    def hollow(self, shard: str) -> None:
        """Free a shard's space; size and header stay, so that a later run sees that the shard was written."""
        descriptor = self._files[shard]
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
        descriptor = self._files[shard]
        if hasattr(os, "copy_file_range"):
            file = reader.descriptor(path)
            try:
                while length and (done := os.copy_file_range(file, descriptor, length, source, target)):
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
    """Size a file and allocate its space now: faster than growing it, and a full disk shows at once."""
    os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
