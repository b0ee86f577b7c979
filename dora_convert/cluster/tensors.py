"""Write the tensors of a plan on a cluster: the nodes write and sync, this process keeps the journal."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch

from ..engine.device_buffers import DeviceBuffers
from ..engine.precision import ComputeSpec, exact_arithmetic
from ..engine.run import Run, StartCheck
from ..engine.tensor import StartMaker
from ..engine.workers import TensorWork
from ..errors import OutputError, UsageError
from ..output.finished import FinishedLine, Task
from ..output.shards import ShardFiles
from ..plan.plan import Plan
from ..settings import Settings
from ..storage.filenames import CLAIM, RECORD
from ..storage.journal import sync_path
from ..storage.reader import Reader
from ..storage.spool import Segment, Spool
from .jobs import Cluster, choose_for, node_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
GROUP_BYTES = 64 << 20
"""Bytes of the tensors that one task writes: much more work than the call, and little to lose."""


class Outcome(NamedTuple):
    """What a task sends back: lines for the journal, and the bytes that they keep in the spool."""

    lines: list[FinishedLine]
    spooled: bytes


@dataclass
class ClusterExecutor:
    """Does the tasks of a run on the nodes of a cluster."""

    cluster: Cluster

    def choose(self, settings: Settings) -> ComputeSpec:
        """Choose device and dtype for all nodes."""
        return choose_for(self.cluster, settings)

    def execute(self, run: Run, tasks: Sequence[Task]) -> None:
        """Do all tasks on the nodes; a token in the output's folder keeps late tasks of a killed run out."""
        assert run.output
        folder, token = run.output.partial, uuid4().hex
        (folder / RECORD / CLAIM).write_text(token, encoding="utf-8")
        job = TensorJob(plan=run.plan, folder=folder, token=token, spec=run.spec, maker=run.maker, check=run.check)
        sizes = {item.name: sum(each.nbytes for each in item.together) for item in run.plan.items}
        try:
            for task, outcome in self.cluster.map(job, grouped(tasks, sizes), gpu=run.spec.device.type == "cuda"):
                start = run.spool.add(outcome.spooled).start if outcome.spooled else 0
                run.take(task, [_moved(line, start) for line in outcome.lines])
                run.advance(_nbytes(task, sizes))
        finally:
            with suppress(OSError):
                (folder / RECORD / CLAIM).unlink()


def grouped(tasks: Iterable[Task], sizes: dict[str, int]) -> Iterator[Task]:
    """Yield tasks of the same kind and shard together, up to some bytes, in the given order."""
    group: Task | None = None
    for task in tasks:
        if group and _goes_with(group, task) and _nbytes(group, sizes) + _nbytes(task, sizes) <= GROUP_BYTES:
            group = group._replace(names=group.names + task.names)
            continue
        if group:
            yield group
        group = task
    if group:
        yield group


def _goes_with(group: Task, task: Task) -> bool:
    return not task.copy and (group.kind, group.shard) == (task.kind, task.shard)


def _nbytes(task: Task, sizes: dict[str, int]) -> int:
    """Return the bytes that a task writes into shards."""
    if task.copy:
        return task.copy.length
    return sum(sizes[name] for name in task.names) if task.kind == "write" else 0


def _moved(line: FinishedLine, start: int) -> FinishedLine:
    """Return a line whose parts lie after `start` in the spool."""
    if not (line.result and line.result.parts):
        return line
    parts = tuple(
        part._replace(segments=tuple(segment._replace(start=start + segment.start) for segment in part.segments))
        for part in line.result.parts
    )
    return FinishedLine(line.made, replace(line.result, parts=parts))


@dataclass(frozen=True, kw_only=True)
class TensorJob:
    """Everything that a node needs to write tensors of a plan."""

    plan: Plan
    folder: Path
    token: str
    spec: ComputeSpec
    maker: StartMaker
    check: StartCheck | None

    def start(self) -> Callable[[Task], Outcome]:
        """Open the files, with one torch thread; return the function that does a task."""
        if self.spec.device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                f"torch finds no CUDA device on {node_name()}.", hint="--device cpu, or install CUDA's torch"
            )
        torch.set_num_threads(1)
        reader, spool = Reader(), MemorySpool()
        shards = SharedShards(self.folder, self.plan)
        buffers = DeviceBuffers(self.spec, reader)
        work = TensorWork(
            plan=self.plan,
            shards=shards,
            reader=reader,
            spool=spool,
            maker=self.maker,
            checker=self.check(self.folder, self.plan, reader) if self.check else None,
            output=None,
            advance=lambda _: None,
            holding=lambda _: nullcontext(),
        )

        def do(task: Task) -> Outcome:
            self._refuse_late()
            with _naming_node(), exact_arithmetic(), shards.writing(task):
                lines = work.do(task, buffers)
            return Outcome(lines, spool.taken())

        return do

    def _refuse_late(self) -> None:
        """Raise OutputError if the output's folder belongs to another run by now."""
        try:
            token = (self.folder / RECORD / CLAIM).read_text(encoding="utf-8")
        except FileNotFoundError:
            token = ""
        if token != self.token:
            raise OutputError(f"{self.folder} belongs to another run now, or is not seen by {node_name()}.")


@contextmanager
def _naming_node() -> Iterator[None]:
    """Add the node's name to an error of its file system."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}, on node {node_name()}", error.filename) from error


class MemorySpool(Spool):
    """A spool whose bytes go to another machine."""

    path = Path()

    def __init__(self) -> None:
        self._data = bytearray()

    def add(self, data: bytes | memoryview) -> Segment:
        """Append bytes; return the segment that holds them."""
        segment = Segment(len(self._data), len(data))
        self._data += data
        return segment

    def taken(self) -> bytes:
        """Return all bytes, and forget them."""
        data = bytes(self._data)
        self._data.clear()
        return data


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
    return struct.pack("hhqqi0q", kind, os.SEEK_SET, start, length, 0)
