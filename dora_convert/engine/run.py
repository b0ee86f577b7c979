"""Run a plan: workers take each tensor from read to write, block by block, within the memory budget.

One worker computes a tensor with one torch thread, in blocks that depend on the tensor's shape alone. So the
bytes of the tensor do not depend on the number of workers, on their order, or on their memory.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..output.finished import Checker, FinishedLine, Progress, Task, copied_name, groups, in_turn, kept_name
from ..output.output import Output, Transfers
from ..output.shards import QUICK_SECONDS, ShardFiles
from ..plan.item import Item
from ..plan.plan import Plan
from ..settings import Settings, __version__
from ..storage.filenames import JOURNAL, SPOOL
from ..storage.journal import Journal, JournalKey, UnfinishedRun
from ..storage.reader import Reader
from ..storage.spool import Spool
from .device_buffers import DeviceBuffers
from .precision import ComputeSpec, choose
from .workers import TensorWork, WorkerPool

if TYPE_CHECKING:
    from .protocols import StartMaker

Hashes = Sequence[Mapping[str, str]]
"""For each adapter, the xxh3-128 of its files by name."""


StartCheck = Callable[[Path, Plan, Reader], Checker]
"""Starts the check of tensors written into a folder."""


class Executor(Protocol):
    """Does the tasks of a run elsewhere than in threads of this process."""

    def choose(self, settings: Settings) -> ComputeSpec:
        """Choose device and dtype, as `engine.precision.choose` does for this machine."""

    def execute(self, run: Run, tasks: Sequence[Task]) -> None:
        """Do all tasks, and pass what comes of each to `run.take`, in this process."""


@dataclass(kw_only=True)
class Run:
    """One execution of a plan."""

    plan: Plan
    settings: Settings
    spec: ComputeSpec
    shards: ShardFiles
    reader: Reader
    spool: Spool
    journal: Journal
    maker: StartMaker
    """Starts the maker of a tensor."""
    check: StartCheck | None = None
    """Starts the check of written tensors; None for no check."""
    progress: Progress = field(default_factory=Progress)
    hub: Transfers | None = None
    output: Output | None = None
    """Makes a tensor's source safe to read, and learns when it is settled; None for a rehearsal."""
    executor: Executor | None = None
    """Does the tasks; None for threads of this process."""
    hashed: Collection[str] = ()
    """Names of copied tensors whose hashes are wanted."""
    resumed: bool = False
    """True if an earlier run had finished some of the work."""
    written: int = 0
    _skipped: int = 0
    _waiting: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _together: dict[str, Sequence[Item]] = field(default_factory=dict)
    """The parts of weights that are coded again, by the weight's name."""
    _workers: WorkerPool[DeviceBuffers] = field(init=False)

    def __post_init__(self) -> None:
        start = DeviceBuffers.dealt(self.spec, self.reader)
        self._workers = WorkerPool(self.settings.max_memory, start, self.reader.stop)

    def execute(self) -> None:
        """Write every output tensor that is not finished yet."""
        tasks = list(self._tasks())
        if self.hub:
            order = {shard.filename: number for number, shard in enumerate(self.plan.shards)}
            tasks.sort(key=lambda task: order[task.shard])
        elif not self.executor:
            tasks = in_turn(tasks)
        checker = self.check(self.output.partial, self.plan, self.reader) if self.check and self.output else None
        if checker:
            checker.read_headers(self.plan.shards)  # before any shard is uploaded
        work = None if self.executor else self._work(checker)
        self._waiting.update(shard for task in tasks for shard in self._shards_of(task))
        for shard in self.plan.shards:
            if not self._waiting[shard.filename]:
                self._finish(shard.filename)
        if self.executor:
            self.executor.execute(self, tasks)
        elif work:
            self._workers.run(self.settings.workers, [partial(self._do, work, task) for task in tasks])

    def adopt(self, lines: Sequence[FinishedLine]) -> None:
        """Count what was done before the run, and enter it in the journal once it is synced."""
        for line in lines:
            self.progress.add(line)
            self.written += line.copied[2] if line.copied else 0
        files = {self.shards.path(line.copied[0]) for line in lines if line.copied}
        self.journal.add_all([(line, None) for line in lines], files)

    def _work(self, checker: Checker | None) -> TensorWork:
        """Return the work of this process's threads."""
        return TensorWork(
            plan=self.plan,
            shards=self.shards,
            reader=self.reader,
            spool=self.spool,
            maker=self.maker,
            checker=checker,
            output=self.output,
            advance=self.advance,
            holding=self._workers.holding,
            tight=self.settings.workers * self.plan.memory > self.settings.max_memory,
        )

    def _do(self, work: TensorWork, task: Task, buffers: DeviceBuffers) -> None:
        self.take(task, work.do(task, buffers), map(self.shards.path, self._shards_of(task)))

    def _tasks(self) -> Iterator[Task]:
        """Yield everything that is not done yet.

        Copies come first: they need no arithmetic, so the disk is busy from the start.
        """
        shard_of, done = self.shards.shard_of, self.progress.done
        copies = [copy for copy in self.shards.copies(self.plan) if copy[2:] not in self.progress.copied]
        finished = {name for name, result in done.items() if result.verdict or not self.check}
        unfinished = [item for item in self.plan.items if not item.verbatim and item.name not in finished]
        items = [item for item in unfinished if not item.part_of]
        left = [*(copy.length for copy in copies), *(each.nbytes for item in items for each in item.together)]
        self._skipped = self.plan.bytes_out - sum(left) - self.written
        yield from (Task("copy", copy.shard, copy=copy) for copy in copies)
        yield from groups("write", items, shard_of, self.settings.workers)
        self._together = {item.name: tuple(item.together) for item in items if item.parts}
        for tensor in self.plan.lost:
            if kept_name(tensor) not in done:
                # its shard waits for this task, so that the tensor's file is still on this machine
                yield Task("keep", self.plan.lost_with[tensor.name], (tensor.name,))
        copied = [item for item in self.plan.items if item.name in self.hashed and copied_name(item) not in done]
        yield from groups("hash", copied, shard_of, self.settings.workers)

    def _shards_of(self, task: Task) -> list[str]:
        """Return the shards that a task writes into or that wait for it, its own first."""
        parts = [part for name in task.names for part in self._together.get(name, ())]
        return list(dict.fromkeys((task.shard, *map(self.shards.shard_of, parts))))

    def take(self, task: Task, lines: Iterable[FinishedLine], files: Iterable[Path] = ()) -> None:
        """Note what came of a task, and enter it in the journal once `files` and the spool are synced."""
        wrong, right = False, []
        for line in lines:
            if line.made is not None and line.result:
                self.progress.done[line.made] = line.result
                if line.result.verdict and line.result.verdict.wrong:
                    wrong = True
                    continue
            right.append((line, self._settled(task, line)))
        self.journal.add_all(right, [*files, self.spool.path])
        for shard in () if wrong else self._shards_of(task):
            self._finish(shard)

    def _settled(self, task: Task, line: FinishedLine) -> Callable[[], None] | None:
        """Return what the output does once a tensor's line is in the journal."""
        if not self.output or task.kind != "write" or line.made not in task.names:
            return None
        return partial(self.output.settled, line.made)

    def _finish(self, shard: str) -> None:
        """Count a task of a shard as done; report the shard after its last task."""
        with self._lock:
            self._waiting[shard] -= 1
            ready = self._waiting[shard] <= 0
        if ready and self.hub:
            self.hub.shard_finished(shard)

    def advance(self, nbytes: int) -> None:
        """Count bytes written, and stop the worker that calls if another has failed."""
        self._workers.check()
        with self._lock:
            self.written += nbytes
            if self.settings.on_progress:
                self.settings.on_progress(self._skipped + self.written, self.plan.bytes_out)


def choose_compute(least: int, settings: Settings, executor: Executor | None = None) -> ComputeSpec:
    """Choose device and dtype, for this machine or an executor's, and notify the caller.

    Raises UsageError if the memory budget is below `least`, the costliest piece of work.
    """
    spec = executor.choose(settings) if executor else choose(settings.device, settings.compute_dtype)
    if spec.staged:
        from .device_plan import fit_settings

        fit_settings(spec, settings)
    settings.check_memory(least)
    settings.notify(f"device: {spec}")
    if settings.workers < len(spec.devices):
        settings.notify(f"{len(spec.devices)} devices, and only {settings.workers} workers: some devices are idle")
    return spec


def journal_key(spec: ComputeSpec, identity: Mapping[str, Any], **inputs: Any) -> JournalKey:
    """Return everything that decides the output's bytes: `identity`, `inputs`, versions and the device."""
    device = spec.device.type
    if device == "cuda":
        from .devices import model_of

        device = model_of(spec.device)
    key = {
        **inputs,
        **identity,
        "versions": [__version__, torch.__version__],
        "device": device,
        "compute": spec.compute_name,
    }
    as_read_back: JournalKey = json.loads(json.dumps(key))
    return as_read_back


def resume_plan(
    output: Output, plan: Plan, hashes: Hashes, spec: ComputeSpec, **inputs: str
) -> tuple[JournalKey, UnfinishedRun | None]:
    """Return the key of a plan's run, and the journal of an unfinished run with this key, or an empty output.

    `hashes` are those of the adapters' files; `inputs` are hashes of other files that decide bytes.
    """
    inputs = {"plan": plan.fingerprint, **inputs}
    adapters = [dict(files) for files in hashes]
    key = journal_key(spec, output.identity([plan.base]), adapters=adapters, **inputs)
    names = [shard.filename for shard in plan.shards]
    return key, output.resume(key, names, lambda: output.resumable(plan), FinishedLine)


def run(
    plan: Plan,
    output: Output,
    settings: Settings,
    *,
    key: JournalKey,
    unfinished: UnfinishedRun | None,
    check: StartCheck | None,
    hub: Transfers | None,
    **details: Any,
) -> Run:
    """Write every tensor that is not finished yet; all bytes and the journal are synced afterwards.

    `details` are fields of `Run`.
    """
    progress = Progress.of(unfinished.lines if unfinished else ())
    if progress.done:
        settings.notify(f"resumed: {len(progress.done)} of {len(plan.items)} tensors were finished before")
    with ExitStack() as stack:
        reader = stack.enter_context(closing(hub.reader() if hub else Reader()))
        spool = stack.enter_context(closing(Spool(output.state / SPOOL, progress.spooled)))
        sparse = hub is not None and not hub.local
        shards = stack.enter_context(closing(output.open_shards(plan, new=unfinished is None, sparse=sparse)))
        early = output.early.finish() if output.early else ()
        if hub:
            hub.begin(output.partial, shards)
        output.sync()
        shards.check(QUICK_SECONDS)
        execution = Run(
            plan=plan,
            settings=settings,
            shards=shards,
            reader=reader,
            spool=spool,
            journal=stack.enter_context(closing(Journal(output.state / JOURNAL, key, unfinished, sync=shards.sync))),
            check=check,
            progress=progress,
            hub=hub,
            output=output,
            resumed=bool(unfinished and unfinished.lines),
            **details,
        )
        execution.adopt(early)
        execution.execute()
        if hub:
            hub.settle()
    return execution
