"""Write into shards that other machines write into at the same time."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

from ..output.finished import Task
from ..output.shards import ShardFiles
from ..plan.plan import Plan
from ..storage.journal import Background, sync_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SYNC_BYTES = 16 << 20
"""After so many bytes the disk begins to write: little is left at the end of a task, and calls are few."""
_NO_LOCKS = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class SharedShards(ShardFiles):
    """Shards that several machines write into at once.

    NFS may write a whole page that it has cached, with old bytes of a neighbour that another machine has
    written meanwhile. With a lock on a range of the file it writes only what the program wrote, and reads the
    file anew.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        super().__init__(folder, plan, create=False, cached=False)
        self._unsynced, self._syncing = 0, cast("Background[None] | None", None)
        self._parts = {item.name: tuple(item.together) for item in plan.items if not item.verbatim}

    def ranges(self, task: Task) -> list[tuple[str, int, int]]:
        """Return shard, begin and end of all that a task writes; neighbours are joined."""
        if task.copy:
            return [(task.copy.shard, task.copy.target, task.copy.target + task.copy.length)]
        ranges: list[tuple[str, int, int]] = []
        parts = [part for name in task.names for part in self._parts[name]] if task.kind == "write" else []
        for shard, start, nbytes in sorted((*self._start[part.name], part.nbytes) for part in parts):
            joins = bool(ranges) and ranges[-1][::2] == (shard, start)
            ranges.append((shard, ranges.pop()[1] if joins else start, start + nbytes))
        return ranges

    @contextmanager
    def writing(self, task: Task, *, sync: bool) -> Iterator[None]:
        """Lock the bytes that a task writes, where the system has such locks.

        With `sync`, the bytes are on the disk at the end of the block. The disk begins while the task computes.
        """
        ranges = self.ranges(task)
        with ExitStack() as stack:
            for shard, start, stop in ranges:
                descriptor = stack.enter_context(self._files.using(self.path(shard)))
                stack.enter_context(_locked(descriptor, start, stop - start))
            if not sync:
                yield
                return
            files = sorted({self.path(shard) for shard, _, _ in ranges})
            self._unsynced, self._syncing = 0, Background("sync", lambda _: _sync(files))
            stack.callback(self._syncing.stop)
            yield
            self._syncing.finish()
            _sync(files)

    def wrote(self, nbytes: int) -> None:
        """Count bytes that the task at work has written, and have the disk begin with them now and then."""
        self._unsynced += nbytes
        if self._syncing and self._unsynced >= SYNC_BYTES:
            self._unsynced = 0
            self._syncing.put(None)


def _sync(files: Iterable[Path]) -> None:
    for file in files:
        sync_path(file)


@contextmanager
def _locked(descriptor: int, start: int, length: int) -> Iterator[None]:
    """Hold a lock of this open file on a range of its bytes; on none if system or file system have no such locks."""
    command = getattr(fcntl, "F_OFD_SETLKW", None)
    if command is None or not length:
        yield
        return
    try:
        fcntl.fcntl(descriptor, command, _flock(fcntl.F_WRLCK, start, length))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        yield
        return
    try:
        yield
    finally:
        fcntl.fcntl(descriptor, command, _flock(fcntl.F_UNLCK, start, length))


def _flock(kind: int, start: int, length: int) -> bytes:
    """Return Linux's struct flock: type, whence, start, length, process (0 for a lock of the open file)."""
    return struct.pack("hhqqi0q", kind, os.SEEK_SET, *(start, length, 0))
