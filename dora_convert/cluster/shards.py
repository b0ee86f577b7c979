"""Make whole shards on the nodes of a cluster: the node that has made a shard uploads it, the driver keeps the journal.

The output goes to an object store or to the Hub (hub/node_upload.py). Shards that share a weight coded in parts are
made together. A node keeps a shard in a folder of its own until the shard is uploaded. So nodes need no common folder.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from ..engine.device_buffers import DeviceBuffers
from ..engine.precision import ComputeSpec, exact_arithmetic
from ..engine.run import Run, StartCheck
from ..engine.workers import StoppedError, TensorWork
from ..output.finished import FinishedLine, Task
from ..output.shards import ShardFiles
from ..plan.plan import Plan
from ..settings import Settings
from ..sources import Session
from ..sources.object_store import StoredFile
from .jobs import Cluster, NodeWork, choose_for
from .node_files import NodeFiles
from .node_spool import NodeSpool, SentBytes
from .tensors import naming_node, nbytes_of, one_thread, spooled

if TYPE_CHECKING:
    from ..engine.protocols import StartMaker

Unit = tuple[str, ...]
"""The names of shards that are made together: mostly one."""


class MadeShards(NamedTuple):
    """The result of a task: lines for the journal, the bytes that they keep in the spool, and the uploaded shards."""

    lines: list[FinishedLine]
    spooled: SentBytes
    files: dict[str, StoredFile]
    """Empty if the check found a wrong tensor: then nothing is uploaded."""


class Destination(Protocol):
    """The place that nodes upload shards to; it is pickled for them."""

    def claim(self) -> None:
        """Mark the place as this run's."""

    def release(self) -> None:
        """Remove the mark."""

    def refuse_late(self) -> None:
        """Raise OutputError if the place belongs to another run by now."""

    def put(self, shard: str, path: Path) -> StoredFile:
        """Upload a shard."""


class UploadAccount(Protocol):
    """Keeps account of the shards that nodes have uploaded."""

    def destination(self) -> Destination:
        """Return the place that nodes upload shards to."""

    def arrived(self, files: Mapping[str, StoredFile]) -> None:
        """Enter uploaded shards."""


@dataclass
class ShardExecutor:
    """Makes the shards of a run on the nodes of a cluster, which upload them."""

    cluster: Cluster

    def choose(self, settings: Settings) -> ComputeSpec:
        """Choose device and dtype for all nodes."""
        return choose_for(self.cluster, settings)

    def execute(self, run: Run, tasks: Sequence[Task]) -> None:
        """Make all shards that have tasks left, each whole."""
        account = cast("UploadAccount", run.hub)
        destination = account.destination()
        destination.claim()
        job = ShardJob(
            plan=run.plan, destination=destination, spec=run.spec, maker=run.maker, check=run.check,
            hashed=frozenset(run.hashed), files=NodeFiles.of(run.plan),
        )  # fmt: skip
        sizes = {item.name: sum(each.nbytes for each in item.together) for item in run.plan.items}
        left = Counter[str]()
        for task in tasks:
            left[task.shard] += nbytes_of(task, sizes)
        try:
            units = [unit for unit in units_of(run.plan) if left.keys() & unit]
            for unit, made in self.cluster.map(job, units):
                lines = spooled(run.spool, made.spooled, made.lines)
                account.arrived(made.files)
                run.take(Task("write", unit[0]), lines)
                run.advance(sum(left[shard] for shard in unit))
        finally:
            with suppress(Exception):  # another error is on its way, or the shards are all there
                destination.release()


def units_of(plan: Plan) -> list[Unit]:
    """Return all shards in order; those that hold parts of the same weight are together."""
    shard_of = {item.name: shard.filename for shard in plan.shards for item in shard.items}
    unit_of: dict[str, list[str]] = {shard.filename: [shard.filename] for shard in plan.shards}
    for item in plan.items:
        if not item.parts:
            continue
        names = [item.name, *(part.name for part in getattr(item.source, "parts", {}).values())]
        names += [part.name for part in item.together]
        for shard in dict.fromkeys(shard_of[name] for name in names if name in shard_of):
            mine, other = unit_of[shard_of[item.name]], unit_of[shard]
            if mine is not other:
                mine += other
                unit_of |= dict.fromkeys(other, mine)
    return [tuple(unit) for unit in {id(unit): unit for unit in unit_of.values()}.values()]


def tasks_of(plan: Plan, unit: Collection[str], files: ShardFiles, hashed: Collection[str]) -> Iterator[Task]:
    """Yield all tasks of some shards."""
    shards = [shard for shard in plan.shards if shard.filename in unit]
    for copy in files.copies(replace(plan, shards=tuple(shards))):
        yield Task("copy", copy.shard, copy=copy)
    for shard in shards:
        names = [item.name for item in shard.items if not item.verbatim and not item.part_of]
        yield Task("write", shard.filename, tuple(names))
        yield Task("hash", shard.filename, tuple(item.name for item in shard.items if item.name in hashed))
    yield Task("keep", shards[0].filename, tuple(each.name for each in plan.lost if plan.lost_with[each.name] in unit))


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Everything that a node needs to make shards of a plan."""

    plan: Plan
    destination: Destination
    spec: ComputeSpec
    maker: StartMaker
    check: StartCheck | None
    hashed: Collection[str]
    """Names of copied tensors whose hashes are wanted."""
    files: NodeFiles

    def start(self) -> ShardWork:
        """Open the inputs, with one torch thread; return what makes shards."""
        one_thread(self.spec)
        return ShardWork(self)


class ShardWork(NodeWork[Unit, MadeShards]):
    """Makes shards one after the other, each in a folder that is removed afterwards."""

    def __init__(self, job: ShardJob) -> None:
        stack = ExitStack()
        super().__init__(self._make, stack)
        self._job, self._stopped = job, False
        self._session = stack.enter_context(Session())
        self._reader = stack.enter_context(closing(job.files.reader(self._session)))
        self._buffers = DeviceBuffers(job.spec, self._reader)

    def _make(self, unit: Unit) -> MadeShards:
        """Make some shards and upload them, unless the check finds a wrong tensor."""
        with naming_node(), exact_arithmetic():
            self._refuse_late()
            folder = self._session.temporary("shards")
            folder.mkdir()
            try:
                return self._made(unit, folder)
            finally:
                for shard in unit:
                    self._reader.forget(folder / shard)
                shutil.rmtree(folder)

    def _made(self, unit: Unit, folder: Path) -> MadeShards:
        job = self._job
        part = replace(job.plan, shards=tuple(shard for shard in job.plan.shards if shard.filename in unit))
        checker = job.check(folder, job.plan, self._reader) if job.check else None
        with ExitStack() as stack:
            shards = stack.enter_context(closing(ShardFiles(folder, part, create=True, sparse=True)))
            spool = stack.enter_context(closing(NodeSpool(self._session)))
            work = TensorWork(
                plan=job.plan, shards=shards, reader=self._reader, spool=spool, maker=job.maker, checker=checker,
                output=None, advance=self._advance, holding=lambda _: nullcontext(),
            )  # fmt: skip
            tasks = tasks_of(job.plan, unit, shards, job.hashed)
            lines = [line for task in tasks for line in work.do(task, self._buffers)]
            record = spool.taken()
        if checker:
            checker.read_headers(part.shards)
        wrong = any(line.result and line.result.verdict and line.result.verdict.wrong for line in lines)
        return MadeShards(lines, record, {} if wrong else self._uploaded(unit, folder))

    def _uploaded(self, unit: Unit, folder: Path) -> dict[str, StoredFile]:
        self._refuse_late()
        return {shard: self._job.destination.put(shard, folder / shard) for shard in unit}

    def _advance(self, _: int) -> None:
        if self._stopped:
            raise StoppedError

    def _refuse_late(self) -> None:
        """Raise OutputError if the output belongs to another run by now."""
        self._advance(0)
        self._job.destination.refuse_late()

    def stop(self) -> None:
        """End the task at work, between two blocks."""
        self._stopped = True
