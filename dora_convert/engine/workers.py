"""Do tasks: `TensorWork` does those of a plan, wherever it runs; `WorkerPool` runs any in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from ..output.finished import Checker, FinishedLine, Task, TensorResult, Verdict, copied_name, kept_name
from ..output.output import Output
from ..output.shards import ShardFiles
from ..plan.item import Item
from ..plan.plan import Plan
from ..storage.reader import Digest, Reader
from ..storage.safetensors import StoredTensor
from ..storage.spool import Spool, SpooledTensor
from .device_buffers import DeviceBuffers
from .precision import exact_arithmetic
from .tensor import MergeStart, write_item

if TYPE_CHECKING:
    from .protocols import StartMaker

Context = TypeVar("Context")
Result = TypeVar("Result")


class StoppedError(Exception):
    """Stops a worker between two blocks, because another worker failed or the user interrupted."""


class WorkerPool(Generic[Context]):
    """Threads that take tasks until one fails, each with its own context and one torch thread."""

    def __init__(self, memory: int, start: Callable[[], Context], release: Callable[[], None]) -> None:
        """`memory` bounds the bytes that all workers hold together.

        `start` makes a worker's context, in its thread. `release` wakes workers that wait for input after a
        failure.
        """
        self._memory = self._free = memory
        self._start, self._release = start, release
        self._changed, self._stop, self._local = threading.Condition(), threading.Event(), threading.local()

    def run(self, workers: int, tasks: Iterable[Callable[[Context], Result]]) -> list[Result]:
        """Run all tasks and return their results, or raise the first error; no worker runs afterwards."""
        with exact_arithmetic(), ThreadPoolExecutor(workers, initializer=self._begin) as pool:
            try:
                futures = [pool.submit(self._call, task) for task in tasks]
                _raise_first(wait(futures, return_when=FIRST_EXCEPTION).done)
                return [future.result() for future in futures]
            except BaseException:
                self._stop.set()
                self._release()
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self) -> None:
        torch.set_num_threads(1)
        self._local.context = self._start()

    def _call(self, task: Callable[[Context], Result]) -> Result:
        return task(self._local.context)

    def check(self) -> None:
        """Stop the worker that calls, if another has failed."""
        if self._stop.is_set():
            raise StoppedError

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Wait until so many bytes of the budget are free, and hold them; at most the whole budget."""
        nbytes = min(nbytes, self._memory)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()


def _raise_first(futures: Iterable[Future[Result]]) -> None:
    """Raise the error of the first future that failed by itself."""
    for future in futures:
        if (error := future.exception()) and not isinstance(error, StoppedError):
            raise error


@dataclass(kw_only=True)
class TensorWork:
    """Does the tasks of one plan, with a worker's buffers; the caller enters what comes of them."""

    plan: Plan
    shards: ShardFiles
    reader: Reader
    spool: Spool
    maker: StartMaker
    """Starts the maker of a tensor."""
    checker: Checker | None
    output: Output | None
    """Makes a tensor's source safe to read; None for a rehearsal."""
    advance: Callable[[int], None]
    """Called with the bytes of each block; may stop the worker."""
    holding: Callable[[int], AbstractContextManager[None]]
    """Waits for so many bytes of the memory budget."""
    tight: bool = False
    """True if all workers together may need more than the budget: then each waits for it, and keeps no buffers."""

    @cached_property
    def _items(self) -> dict[str, Item]:
        return {item.name: item for item in self.plan.items}

    @cached_property
    def _lost(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for tensor in self.plan.lost}

    def do(self, task: Task, buffers: DeviceBuffers) -> list[FinishedLine]:
        """Do a task; return the lines for the journal, which count once the bytes behind them are synced."""
        if task.copy:
            return [self._copied(task)]
        if task.kind == "keep":
            return [self._kept(self._lost[name]) for name in task.names]
        items = [self._items[name] for name in task.names]
        if task.kind == "hash":
            return [self._hashed(item) for item in items]
        if not self.tight:
            return self._all_written(items, buffers)
        return [line for item in items for line in self._written(item, buffers)]

    def _copied(self, task: Task) -> FinishedLine:
        assert task.copy
        self.advance(0)
        self.shards.copy(task.copy, self.reader)
        self.advance(task.copy.length)
        return FinishedLine(copied=task.copy[2:])

    def _hashed(self, item: Item) -> FinishedLine:
        """Return the hash of a copied tensor."""
        self.advance(0)
        digest = self.reader.digest(item.source).fast
        return FinishedLine(copied_name(item), TensorResult(digest, digest, None))

    def _written(self, item: Item, buffers: DeviceBuffers) -> list[FinishedLine]:
        """Write and check one tensor within the memory budget, and give its memory back."""
        with self.holding(self.plan.cost(item)):
            lines = self._all_written([item], buffers)
            buffers.release()
        return lines

    def _all_written(self, items: Sequence[Item], buffers: DeviceBuffers) -> list[FinishedLine]:
        """Write tensors one after the other, and check them together."""
        items = [self.output.prepare(item, self.reader) if self.output else item for item in items]
        together = self._stacked(items, buffers) if len(items) > 1 and not buffers.staged else {}
        written = [together.get(item.name) or self._results(item, buffers) for item in items]
        verdicts = self._verdicts([(item, each[item.name]) for item, each in zip(items, written, strict=True)], buffers)
        each = zip(items, written, verdicts, strict=True)
        return [line for item, results, verdict in each for line in _lines(item, results, verdict)]

    def _stacked(self, items: Sequence[Item], buffers: DeviceBuffers) -> dict[str, dict[str, TensorResult]]:
        """Write the small weights that can be merged together; return the facts, by name and name again."""
        start = self.maker
        if not isinstance(start, MergeStart) or start.prove:
            return {}
        from .stacked import StackedMerge, stacks

        merge = StackedMerge(
            start=start, buffers=buffers, shards=self.shards, spool=self.spool, advance=self.advance
        )  # fmt: skip
        found = [merge.results(weights) for weights in stacks(items, start.memory, self.plan.cost)]
        return {name: {name: result} for results in found for name, result in results.items()}

    def _results(self, item: Item, buffers: DeviceBuffers) -> dict[str, TensorResult]:
        """Write a tensor, and the further parts of a weight that is coded again; return the facts by name."""
        with buffers.working():
            maker = self.maker(item, buffers, self.spool)
            return write_item(item, maker, buffers, self.shards, self.advance)

    def _verdicts(
        self, finished: Sequence[tuple[Item, TensorResult]], buffers: DeviceBuffers
    ) -> Sequence[Verdict | None]:
        if not self.checker:
            return [None] * len(finished)
        with buffers.working():
            return self.checker.check_all(finished, buffers.spec.device if buffers.staged else None)

    def _kept(self, tensor: StoredTensor) -> FinishedLine:
        """Copy a whole tensor of the base into the undo record."""
        digest, segments = Digest(proof=self.plan.options.exact), []
        for piece in self.reader.pieces(tensor):
            digest.update(piece)
            segments.append(self.spool.add(piece))
            self.advance(0)
        part = SpooledTensor(kept_name(tensor), tensor.dtype, tensor.shape, tuple(segments))
        return FinishedLine(part.name, TensorResult(digest.fast, digest.fast, digest.proof, (part,)))


def _lines(item: Item, results: dict[str, TensorResult], verdict: Verdict | None) -> Iterator[FinishedLine]:
    """Yield the lines of a tensor and its further parts; of a wrong one, only its own line."""
    others = {} if verdict and verdict.wrong else results
    yield from (FinishedLine(name, each) for name, each in others.items() if name != item.name)
    yield FinishedLine(item.name, results[item.name].judged(verdict))
