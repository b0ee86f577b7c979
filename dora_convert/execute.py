"""Run a plan: workers that each take a tensor from read to write, block by block, within a byte budget.

The only file with threads. One thread makes a tensor, with one torch thread, in blocks that the tensor's shape alone
decides: its bytes do not depend on how many workers there are, in which order they run, or what they may hold.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from .items import Item
from .journal import Journal, Record
from .lane import Lane
from .make import make
from .plan import Plan
from .precision import Choice, exact_arithmetic
from .selfcheck import Checker, Verdict
from .stored import Reader
from .undo import Part, Segment, Spool
from .writer import Copy, ShardFiles


class StoppedError(Exception):
    """Another worker failed, or the user interrupted: this one stops between two blocks."""


class Budget:
    """Bytes that all workers together may hold."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Wait until so many bytes are free, and hold them."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()


@dataclass(frozen=True)
class Done:
    """What is known of a tensor once it is written: xxh3-128 of its old and new bytes, undo parts, the self-check."""

    base_hash: str | None
    written_hash: str
    parts: tuple[Part, ...]
    verdict: Verdict | None


@dataclass
class Progress:
    """What is finished so far, by this run and by one that it continues."""

    done: dict[str, Done] = field(default_factory=dict)
    copied: set[tuple[str, int, int]] = field(default_factory=set)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Progress:
        """Read back what `copy_record` and `done_record` have written."""
        progress = cls()
        for record in records:
            if "copied" in record:
                shard, target, length = record["copied"]
                progress.copied.add((shard, target, length))
            else:
                parts = tuple(
                    Part(name, dtype, tuple(shape), tuple(Segment(*segment) for segment in segments))
                    for name, dtype, shape, segments in record["parts"]
                )
                verdict = Verdict(**record["verdict"]) if record["verdict"] else None
                base_hash, written_hash = record["hashes"]
                progress.done[record["made"]] = Done(base_hash, written_hash, parts, verdict)
        return progress

    @property
    def spooled(self) -> int:
        """How much of the spool they use."""
        return max((part.end for done in self.done.values() for part in done.parts), default=0)


def raise_first(futures: Iterable[Future[None]]) -> None:
    """Raise what went wrong in the first future that failed by itself."""
    for future in futures:
        error = future.exception()
        if error and not isinstance(error, StoppedError):
            raise error


def copy_record(copy: Copy) -> Record:
    """A finished copy as a line of the journal."""
    return {"copied": copy[2:]}


def done_record(name: str, done: Done) -> Record:
    """A finished tensor as a line of the journal."""
    return {
        "made": name,
        "hashes": [done.base_hash, done.written_hash],
        "parts": done.parts,
        "verdict": asdict(done.verdict) if done.verdict else None,
    }


@dataclass
class Run:
    """One execution of a plan."""

    plan: Plan
    shards: ShardFiles
    reader: Reader
    spool: Spool
    journal: Journal
    choice: Choice
    budget: Budget
    checker: Checker | None
    on_progress: Callable[[int, int], None] | None
    progress: Progress
    on_shard: Callable[[str], None] | None = None
    """Called with the name of each shard once all of it is written and, if it is checked, right; by workers."""
    on_stop: Callable[[], None] | None = None
    """Called when nothing more will be made, with workers perhaps waiting for their input."""
    written: int = 0
    _skipped: int = 0
    _waiting: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _local: threading.local = field(default_factory=threading.local)

    def execute(self, workers: int) -> None:
        """Make every output tensor that is not finished yet.

        Copies come first: they need no arithmetic, and the disk can start on them.
        """
        copies = [copy for copy in self.shards.copies(self.plan) if copy[2:] not in self.progress.copied]
        items = [item for item in self.plan.items if not item.verbatim and not self._finished(item)]
        self._skipped = self.plan.bytes_out - sum(
            [*(copy.length for copy in copies), *(item.nbytes for item in items)]
        )
        self._waiting.update([*(copy.shard for copy in copies), *map(self.shards.shard_of, items)])
        for shard in self.plan.shards:
            if not self._waiting[shard.filename]:
                self._finish(shard.filename)
        with exact_arithmetic(), ThreadPoolExecutor(workers, initializer=self._start) as pool:
            try:
                futures = [pool.submit(job) for job in self._jobs(copies, items)]
                raise_first(wait(futures, return_when=FIRST_EXCEPTION).done)
            finally:
                self._stop.set()
                if self.on_stop:
                    self.on_stop()
                pool.shutdown(wait=True, cancel_futures=True)

    def _jobs(self, copies: Sequence[Copy], items: Sequence[Item]) -> list[Callable[[], None]]:
        """Copies first; where somebody waits for shards, one shard after the other."""
        jobs = [(copy.shard, partial(self._copy, copy)) for copy in copies]
        jobs += [(self.shards.shard_of(item), partial(self._make, item)) for item in items]
        if self.on_shard:
            place = {shard.filename: number for number, shard in enumerate(self.plan.shards)}
            jobs.sort(key=lambda job: place[job[0]])
        return [job for _, job in jobs]

    def _finished(self, item: Item) -> bool:
        done = self.progress.done.get(item.name)
        return done is not None and not (self.checker and done.verdict is None)

    def _start(self) -> None:
        torch.set_num_threads(1)
        self._local.lane = Lane(self.choice, self.reader)

    def _copy(self, copy: Copy) -> None:
        self.advance(0)
        self.shards.copy(copy, self.reader)
        self.journal.add(copy_record(copy), [self.shards.descriptor(copy.shard)])
        self.advance(copy.length)
        self._finish(copy.shard)

    def _make(self, item: Item) -> None:
        lane: Lane = self._local.lane
        with self.budget.holding(item.cost(self.plan.options.width)):
            with lane.working():
                made = make(item, lane, self.shards, self.spool, self.plan.options, self.advance)
            verdict = self.checker.check(item) if self.checker else None
        done = Done(made.base_hash, made.written_hash, made.parts, verdict)
        self.progress.done[item.name] = done
        if not (verdict and verdict.wrong):
            files = [self.shards.descriptor(self.shards.shard_of(item)), self.spool.descriptor]
            self.journal.add(done_record(item.name, done), files)
            self._finish(self.shards.shard_of(item))

    def _finish(self, shard: str) -> None:
        """Count a part of a shard as done; the last one makes it ready."""
        with self._lock:
            self._waiting[shard] -= 1
            ready = self._waiting[shard] <= 0
        if ready and self.on_shard:
            self.on_shard(shard)

    def advance(self, nbytes: int) -> None:
        """Count bytes written, and stop here if another worker has failed."""
        if self._stop.is_set():
            raise StoppedError
        with self._lock:
            self.written += nbytes
            if self.on_progress:
                self.on_progress(self._skipped + self.written, self.plan.bytes_out)
