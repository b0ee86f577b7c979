"""Write the tensors of a plan on a cluster: the nodes write and sync, this process keeps the journal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

import torch

from ..engine.device_buffers import DeviceBuffers
from ..engine.precision import ComputeSpec, exact_arithmetic
from ..engine.run import Run, StartCheck
from ..engine.workers import TensorWork
from ..errors import OutputError, UsageError
from ..output.finished import FinishedLine, Task
from ..plan.plan import Plan
from ..settings import Settings
from ..sources import Session
from ..storage.filenames import CLAIM, RECORD
from ..storage.spool import Spool
from . import jobs
from .jobs import Cluster, NodeWork, choose_for, node_name
from .node_files import NodeFiles
from .node_spool import NodeSpool, SentBytes
from .shared_shards import SharedShards

if TYPE_CHECKING:
    from ..engine.protocols import StartMaker


class Outcome(NamedTuple):
    """The result of a task: lines for the journal, and the bytes that they keep in the spool."""

    lines: list[FinishedLine]
    spooled: SentBytes
    unsynced: tuple[Path, ...]
    """Files that hold the bytes and are not synced yet."""


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
        job = TensorJob(
            plan=run.plan, folder=folder, token=token, spec=run.spec, maker=run.maker, check=run.check,
            files=NodeFiles.of(run.plan),
        )  # fmt: skip
        sizes = {item.name: sum(each.nbytes for each in item.together) for item in run.plan.items}
        try:
            together = grouped(tasks, sizes, self.cluster.slots)
            for task, outcome in self.cluster.map(job, together, withdraw=job.withdraw):
                lines = spooled(run.spool, outcome.spooled, outcome.lines)
                run.take(task, lines, outcome.unsynced)
                run.advance(nbytes_of(task, sizes))
        finally:
            job.withdraw()


def grouped(tasks: Sequence[Task], sizes: dict[str, int], slots: int) -> Iterator[Task]:
    """Yield tasks of the same kind and shard together, up to some bytes, in the given order."""
    group, total, left = list[Task](), 0, sum(nbytes_of(task, sizes) for task in tasks)
    for task in tasks:
        nbytes = nbytes_of(task, sizes)
        if group and not (_goes_with(group[0], task) and total + nbytes <= jobs.task_bytes(left, slots)):
            yield _joined(group)
            group, total, left = [], 0, left - total
        group.append(task)
        total += nbytes
    if group:
        yield _joined(group)


def _joined(group: Sequence[Task]) -> Task:
    return group[0]._replace(names=tuple(name for task in group for name in task.names))


def _goes_with(group: Task, task: Task) -> bool:
    return not task.copy and (group.kind, group.shard) == (task.kind, task.shard)


def nbytes_of(task: Task, sizes: dict[str, int]) -> int:
    """Return the bytes that a task writes into shards."""
    if task.copy:
        return task.copy.length
    return sum(sizes[name] for name in task.names) if task.kind == "write" else 0


def spooled(spool: Spool, record: SentBytes, lines: Sequence[FinishedLine]) -> list[FinishedLine]:
    """Append a task's record to the spool; return the task's lines with the places of their parts."""
    start = spool.add(record.data).start if record.data else 0
    return [_moved(line, start) for line in lines]


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
    files: NodeFiles
    driver: tuple[str, int] = field(default_factory=lambda: (node_name(), os.getpid()))
    """The process that keeps the journal. It syncs its own bytes in the journal's thread."""

    def start(self) -> NodeWork[Task, Outcome]:
        """Open the files, with one torch thread; return what does a task."""
        one_thread(self.spec)
        stack = ExitStack()
        session = stack.enter_context(Session())
        reader = stack.enter_context(closing(self.files.reader(session)))
        spool = stack.enter_context(closing(NodeSpool(session)))
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
            advance=shards.wrote,
            holding=lambda _: nullcontext(),
        )

        sync = self.driver != (node_name(), os.getpid())

        def do(task: Task) -> Outcome:
            self._refuse_late()
            with naming_node(), exact_arithmetic(), shards.writing(task, sync=sync):
                lines = work.do(task, buffers)
            unsynced = {shards.path(shard) for shard, _, _ in shards.ranges(task)} if not sync else ()
            return Outcome(lines, spool.taken(), tuple(unsynced))

        stack.enter_context(closing(shards))
        return NodeWork(do, stack)

    def withdraw(self) -> None:
        """Remove the claim, without which no task begins."""
        with suppress(OSError):
            (self.folder / RECORD / CLAIM).unlink()

    def _refuse_late(self) -> None:
        """Raise OutputError if the output's folder belongs to another run by now."""
        try:
            token = (self.folder / RECORD / CLAIM).read_text(encoding="utf-8")
        except FileNotFoundError:
            token = ""
        if token != self.token:
            raise OutputError(f"{self.folder} belongs to another run now, or is not seen by {node_name()}.")


def one_thread(spec: ComputeSpec) -> None:
    """Give this process one torch thread; raise UsageError if it lacks the device that was chosen."""
    if spec.device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"torch finds no CUDA device on {node_name()}.", hint="--device cpu, or install CUDA's torch")
    torch.set_num_threads(1)


@contextmanager
def naming_node() -> Iterator[None]:
    """Add the node's name to an error of its file system."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}, on node {node_name()}", error.filename) from error
