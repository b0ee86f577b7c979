"""Run tasks in worker threads within a memory budget, until the first error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from .precision import exact_arithmetic

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
