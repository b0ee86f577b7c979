"""Run a plan: workers that each take a tensor from read to write, block by block, within a byte budget.

The only file with threads. One thread makes a tensor, with one torch thread, in blocks that the tensor's shape alone
decides: its bytes do not depend on how many workers there are, in which order they run, or what they may hold.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch

from ..output.finished import (
    FinishedLine,
    Progress,
    TensorResult,
    Verdict,
    copied_name,
    kept_name,
)
from ..output.output import Output
from ..output.shards import Copy, ShardFiles
from ..plan.item import Item
from ..plan.plan import Plan
from ..storage.journal import Journal
from ..storage.reader import Digest, Reader
from ..storage.safetensors import StoredTensor
from ..storage.spool import Spool, SpooledTensor
from .device_buffers import DeviceBuffers
from .precision import ComputeSpec, exact_arithmetic
from .tensor import MakeTensor, make_tensor

Job = tuple[str, Callable[[DeviceBuffers], None]]
"""A piece of work, and the shard that it is for."""


class Checker(Protocol):
    """Compares written tensors with what they should be."""

    def check(self, item: Item, digest: str) -> Verdict:
        """Return what a check of one tensor found; `digest` is the xxh3-128 of its written bytes."""


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


def raise_first(futures: Iterable[Future[None]]) -> None:
    """Raise what went wrong in the first future that failed by itself."""
    for future in futures:
        error = future.exception()
        if error and not isinstance(error, StoppedError):
            raise error


class WorkerPool:
    """Workers with a lane each, who take tasks until one fails; they use one torch thread each."""

    def __init__(self, spec: ComputeSpec, reader: Reader) -> None:
        self._spec, self._reader = spec, reader
        self._stop, self._local = threading.Event(), threading.local()

    def run(self, workers: int, tasks: Iterable[Callable[[DeviceBuffers], None]]) -> None:
        """Run all tasks; when this returns, or raises what the first of them did, no worker runs any more."""
        with exact_arithmetic(), ThreadPoolExecutor(workers, initializer=self._start) as pool:
            try:
                futures = [pool.submit(self._one, task) for task in tasks]
                raise_first(wait(futures, return_when=FIRST_EXCEPTION).done)
            except BaseException:
                self._stop.set()
                self._reader.stop()
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        torch.set_num_threads(1)
        self._local.buffers = DeviceBuffers(self._spec, self._reader)

    def _one(self, task: Callable[[DeviceBuffers], None]) -> None:
        task(self._local.buffers)

    def check(self) -> None:
        """Stop the worker that asks, if another has failed."""
        if self._stop.is_set():
            raise StoppedError


@dataclass
class Run:
    """One execution of a plan."""

    plan: Plan
    shards: ShardFiles
    reader: Reader
    spool: Spool
    journal: Journal
    spec: ComputeSpec
    budget: Budget
    make: MakeTensor
    """Starts the maker of a tensor."""
    checker: Checker | None
    on_progress: Callable[[int, int], None] | None
    progress: Progress
    on_shard: Callable[[str], None] | None = None
    """Called with the name of each shard once all of it is written and, if it is checked, right; by workers."""
    output: Output | None = None
    """Prepares what a tensor is made of, and is told when it is settled; None where nothing is kept."""
    hashed: Collection[str] = ()
    """Copied tensors whose hashes are wanted, by name."""
    tight: bool = False
    """Whether workers wait for each other's memory."""
    written: int = 0
    _skipped: int = 0
    _waiting: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _crew: WorkerPool = field(init=False)

    def __post_init__(self) -> None:
        self._crew = WorkerPool(self.spec, self.reader)

    def execute(self, workers: int) -> None:
        """Make every output tensor that is not finished yet.

        Copies come first: they need no arithmetic, and the disk can start on them.
        """
        copies = [copy for copy in self.shards.copies(self.plan) if copy[2:] not in self.progress.copied]
        items = [item for item in self.plan.items if not item.verbatim and not self._finished(item)]
        self._skipped = self.plan.bytes_out - sum(
            [*(copy.length for copy in copies), *(item.nbytes for item in items)]
        )
        jobs = self._jobs(copies, items)
        self._waiting.update(shard for shard, _ in jobs)
        for shard in self.plan.shards:
            if not self._waiting[shard.filename]:
                self._finish(shard.filename)
        self._crew.run(workers, [job for _, job in jobs])

    def _jobs(self, copies: Sequence[Copy], items: Sequence[Item]) -> list[Job]:
        """What is to be done and for which shard, copies first; where somebody waits for shards, one after the other."""
        jobs: list[Job] = [(copy.shard, partial(self._copy, copy)) for copy in copies]
        jobs += [(self.shards.shard_of(item), partial(self._make, item)) for item in items]
        unkept = [tensor for tensor in self.plan.lost if kept_name(tensor) not in self.progress.done]
        jobs += [(self.plan.lost_with[tensor.name], partial(self._keep, tensor)) for tensor in unkept]
        jobs += [
            (self.shards.shard_of(item), partial(self._hash, item))
            for item in self.plan.items
            if item.name in self.hashed and copied_name(item) not in self.progress.done
        ]
        if self.on_shard:
            place = {shard.filename: number for number, shard in enumerate(self.plan.shards)}
            jobs.sort(key=lambda job: place[job[0]])
        return jobs

    def _finished(self, item: Item) -> bool:
        done = self.progress.done.get(item.name)
        return done is not None and not (self.checker and done.verdict is None)

    def _copy(self, copy: Copy, buffers: DeviceBuffers) -> None:  # noqa: ARG002 - needs none
        self.advance(0)
        self.shards.copy(copy, self.reader)
        self.journal.add(FinishedLine(copied=copy[2:]), [self.shards.descriptor(copy.shard)])
        self.advance(copy.length)
        self._finish(copy.shard)

    def _hash(self, item: Item, buffers: DeviceBuffers) -> None:  # noqa: ARG002 - needs none
        """Note what a copied tensor is."""
        self.advance(0)
        found = self.reader.digest(item.source).fast
        self.progress.done[copied_name(item)] = done = TensorResult(found, found, None)
        self.journal.add(FinishedLine(copied_name(item), done), [])
        self._finish(self.shards.shard_of(item))

    def _make(self, item: Item, buffers: DeviceBuffers) -> None:
        item = self.output.prepare(item, self.reader) if self.output else item
        with self.budget.holding(self.plan.cost(item)):
            with buffers.working():
                maker = self.make(item, buffers, self.spool)
                result = make_tensor(item, maker, buffers, self.shards, self.advance)
            del maker  # with its factors, before another worker takes the room
            if self.checker:
                result = replace(result, verdict=self.checker.check(item, result.written_hash))
            if self.tight:
                buffers.release()
        self.progress.done[item.name] = result
        if not (result.verdict and result.verdict.wrong):
            files = [self.shards.descriptor(self.shards.shard_of(item)), self.spool.descriptor]
            settled = partial(self.output.settled, item) if self.output else None
            self.journal.add(FinishedLine(item.name, result), files, settled)
            self._finish(self.shards.shard_of(item))

    def _finish(self, shard: str) -> None:
        """Count a part of a shard as done; the last one makes it ready."""
        with self._lock:
            self._waiting[shard] -= 1
            ready = self._waiting[shard] <= 0
        if ready and self.on_shard:
            self.on_shard(shard)

    def _keep(self, tensor: StoredTensor, buffers: DeviceBuffers) -> None:  # noqa: ARG002 - needs none
        """Bring a whole tensor of the base into the record; its shard is not ready before, so that its file is here."""
        digest, segments = Digest(proof=self.plan.options.exact), []
        for piece in self.reader.pieces(tensor):
            digest.update(piece)
            segments.append(self.spool.add(piece))
            self.advance(0)
        name = kept_name(tensor)
        part = SpooledTensor(name, tensor.dtype, tensor.shape, tuple(segments))
        self.progress.done[name] = done = TensorResult(digest.fast, digest.fast, digest.proof, (part,))
        self.journal.add(FinishedLine(name, done), [self.spool.descriptor])
        self._finish(self.plan.lost_with[tensor.name])

    def advance(self, nbytes: int) -> None:
        """Count bytes written, and stop here if another worker has failed."""
        self._crew.check()
        with self._lock:
            self.written += nbytes
            if self.on_progress:
                self.on_progress(self._skipped + self.written, self.plan.bytes_out)
