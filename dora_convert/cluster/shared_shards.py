"""Write into shards that other machines write into at the same time."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..output.finished import Task
from ..output.shards import ShardFiles
from ..plan.plan import Plan
from ..storage.journal import sync_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class SharedShards(ShardFiles):
    """Shards that several machines write into at once.

    NFS may write a whole page that it has cached, with old bytes of a neighbour that another machine has
    written meanwhile. With a lock on a range of the file it writes only what the program wrote, and reads the
    file anew.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        super().__init__(folder, plan, create=False)
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
    def writing(self, task: Task) -> Iterator[None]:
        """Lock the bytes that a task writes, where the system has such locks; sync them at the end of the block."""
        ranges = self.ranges(task)
        with ExitStack() as stack:
            for shard, start, stop in ranges:
                descriptor = stack.enter_context(self._files.using(self.path(shard)))
                stack.enter_context(_locked(descriptor, start, stop - start))
            yield
            for shard in sorted({shard for shard, _, _ in ranges}):
                sync_path(self.path(shard))


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
