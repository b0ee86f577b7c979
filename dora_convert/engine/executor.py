"""Execute a plan: workers take each tensor from read to write, block by block, within the memory budget.

One worker computes a tensor with one torch thread, in blocks that depend on the tensor's shape alone. So the
bytes of the tensor do not depend on the number of workers, on their order, or on their memory.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..output.finished import FinishedLine, Progress, TensorResult, Verdict, copied_name, kept_name
from ..output.shards import Copy, ShardFiles
from ..plan.item import Item
from ..plan.plan import Plan
from ..settings import Settings
from ..storage.journal import Journal
from ..storage.reader import Digest, Reader
from ..storage.safetensors import StoredTensor
from ..storage.spool import Spool, SpooledTensor
from .device_buffers import DeviceBuffers
from .precision import ComputeSpec
from .tensor import StartMaker, write_tensor
from .workers import WorkerPool

if TYPE_CHECKING:
    from ..output.output import Output

Task = Callable[[DeviceBuffers], None]


class Checker(Protocol):
    """Compares written tensors with their definitions."""

    def check(self, item: Item, digest: str) -> Verdict:
        """Return the verdict on one tensor; `digest` is the xxh3-128 of its written bytes."""


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
    checker: Checker | None = None
    progress: Progress = field(default_factory=Progress)
    on_shard: Callable[[str], None] | None = None
    """Called by workers with the name of each shard that is written whole and, if checked, right."""
    output: Output | None = None
    """Makes a tensor's source safe to read, and learns when it is settled; None for a rehearsal."""
    hashed: Collection[str] = ()
    """Names of copied tensors whose hashes are wanted."""
    written: int = 0
    _skipped: int = 0
    _waiting: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _workers: WorkerPool[DeviceBuffers] = field(init=False)

    def __post_init__(self) -> None:
        start = partial(DeviceBuffers, self.spec, self.reader)
        self._workers = WorkerPool(self.settings.max_memory, start, self.reader.stop)
        self._tight = self.settings.workers * self.plan.memory > self.settings.max_memory

    def execute(self) -> None:
        """Write every output tensor that is not finished yet."""
        tasks = list(self._tasks())
        if self.on_shard:
            order = {shard.filename: number for number, shard in enumerate(self.plan.shards)}
            tasks.sort(key=lambda task: order[task[0]])
        self._waiting.update(shard for shard, _ in tasks)
        for shard in self.plan.shards:
            if not self._waiting[shard.filename]:
                self._finish(shard.filename)
        self._workers.run(self.settings.workers, [task for _, task in tasks])

    def _tasks(self) -> Iterator[tuple[str, Task]]:
        """Yield each task after the name of its shard.

        Copies come first: they need no arithmetic, so the disk is busy from the start.
        """
        shard_of, done = self.shards.shard_of, self.progress.done
        copies = [copy for copy in self.shards.copies(self.plan) if copy[2:] not in self.progress.copied]
        items = [item for item in self.plan.items if not item.verbatim and not self._is_finished(item)]
        left = [*(copy.length for copy in copies), *(item.nbytes for item in items)]
        self._skipped = self.plan.bytes_out - sum(left)
        yield from ((copy.shard, partial(self._copy, copy)) for copy in copies)
        yield from ((shard_of(item), partial(self._compute, item)) for item in items)
        for tensor in self.plan.lost:
            if kept_name(tensor) not in done:
                yield self.plan.lost_with[tensor.name], partial(self._keep, tensor)
        for item in self.plan.items:
            if item.name in self.hashed and copied_name(item) not in done:
                yield shard_of(item), partial(self._hash, item)

    def _is_finished(self, item: Item) -> bool:
        done = self.progress.done.get(item.name)
        return done is not None and not (self.checker and done.verdict is None)

    def _copy(self, copy: Copy, _: DeviceBuffers) -> None:
        self.advance(0)
        self.shards.copy(copy, self.reader)
        self.journal.add(FinishedLine(copied=copy[2:]), [self.shards.path(copy.shard)])
        self.advance(copy.length)
        self._finish(copy.shard)

    def _hash(self, item: Item, _: DeviceBuffers) -> None:
        """Enter the hash of a copied tensor."""
        self.advance(0)
        digest = self.reader.digest(item.source).fast
        self._enter(copied_name(item), TensorResult(digest, digest, None), [])
        self._finish(self.shards.shard_of(item))

    def _compute(self, item: Item, buffers: DeviceBuffers) -> None:
        item = self.output.prepare(item, self.reader) if self.output else item
        shard = self.shards.shard_of(item)
        with self._workers.holding(self.plan.cost(item)):
            with buffers.working():
                maker = self.maker(item, buffers, self.spool)
                result = write_tensor(item, maker, buffers, self.shards, self.advance)
            del maker  # with its factors, before another worker takes the memory
            if self.checker:
                result = replace(result, verdict=self.checker.check(item, result.written_hash))
            if self._tight:
                buffers.release()
        if result.verdict and result.verdict.wrong:
            self.progress.done[item.name] = result
            return
        settled = partial(self.output.settled, item) if self.output else None
        self._enter(item.name, result, [self.shards.path(shard), self.spool.path], settled)
        self._finish(shard)

    def _keep(self, tensor: StoredTensor, _: DeviceBuffers) -> None:
        """Copy a whole tensor of the base into the undo record.

        The tensor's shard waits for this task, so that the tensor's file is still on this machine.
        """
        digest, segments = Digest(proof=self.plan.options.exact), []
        for piece in self.reader.pieces(tensor):
            digest.update(piece)
            segments.append(self.spool.add(piece))
            self.advance(0)
        part = SpooledTensor(kept_name(tensor), tensor.dtype, tensor.shape, tuple(segments))
        result = TensorResult(digest.fast, digest.fast, digest.proof, (part,))
        self._enter(part.name, result, [self.spool.path])
        self._finish(self.plan.lost_with[tensor.name])

    def _enter(
        self, name: str, result: TensorResult, files: Collection[Path], then: Callable[[], None] | None = None
    ) -> None:
        """Note a result, and enter it in the journal once `files` are synced."""
        self.progress.done[name] = result
        self.journal.add(FinishedLine(name, result), files, then)

    def _finish(self, shard: str) -> None:
        """Count a task of a shard as done; report the shard after its last task."""
        with self._lock:
            self._waiting[shard] -= 1
            ready = self._waiting[shard] <= 0
        if ready and self.on_shard:
            self.on_shard(shard)

    def advance(self, nbytes: int) -> None:
        """Count bytes written, and stop the worker that calls if another has failed."""
        self._workers.check()
        with self._lock:
            self.written += nbytes
            if self.settings.on_progress:
                self.settings.on_progress(self._skipped + self.written, self.plan.bytes_out)
