"""Hand tasks to workers: threads of this process, and processes of other nodes, each with one task at a time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from queue import SimpleQueue
from threading import Timer
from typing import Any, Generic, Protocol

from ..errors import OutputError
from .jobs import NodeJob, NodeWork, Result, Work
from .node import end

AHEAD = 2
"""Tasks of a worker that run or wait: enough that no worker is idle, and few to wait for at the end."""
RETRIES = 5
"""Workers that one task may lose before the run fails, and processes that a worker may lose before it is given up."""
RENEW_SECONDS = 1.5
"""A worker that did not start is renewed after this time, then after twice as much: a new cluster may need some."""
END_SECONDS = 60
"""The time for running tasks to end after an error."""


class WorkerLostError(Exception):
    """Says that a worker is gone, with the tasks that it had."""


class Worker(Protocol):
    """Starts a job, and then does its tasks one after the other."""

    def start(self, job: Any) -> Future[Any]:
        """Start a job."""

    def send(self, task: Any) -> Future[Any]:
        """Do a task after all that were sent before."""

    def result(self, future: Future[Any]) -> Any:
        """Return what a start or a task returned, or raise its error, or WorkerLostError."""

    def renew(self) -> None:
        """Take another process instead of one that was lost."""

    def close(self) -> None:
        """Do no further task."""


class ThreadWorker:
    """A worker in a thread of this process."""

    def __init__(self) -> None:
        self._pool, self._closed = ThreadPoolExecutor(1, "worker"), False
        self._do: Callable[[Any], Any] | None = None

    def start(self, job: NodeJob[Any, Any]) -> Future[Any]:
        """Start a job."""
        return self._pool.submit(self._start, job)

    def _start(self, job: NodeJob[Any, Any]) -> None:
        self._do = job.start()

    def send(self, task: Any) -> Future[Any]:
        """Do a task after all that were sent before."""
        return self._pool.submit(self._one, task)

    def _one(self, task: Any) -> Any:
        if self._closed or not self._do:
            raise WorkerLostError
        return self._do(task)

    def result(self, future: Future[Any]) -> Any:
        """Return what a start or a task returned, or raise its error."""
        return future.result()

    def renew(self) -> None:
        """Do nothing: the thread is not lost before this process."""

    def close(self) -> None:
        """Do no further task, and end the one at work if the job can."""
        self._closed = True
        if isinstance(self._do, NodeWork):
            self._do.stop()
        with suppress(RuntimeError):  # closed before
            self._pool.submit(end, self._do)
        self._pool.shutdown(wait=False)


class Dispatch(Generic[Work, Result]):
    """Hands the tasks of a job to workers, and yields their results."""

    def __init__(
        self, workers: Sequence[Worker], start: Callable[[Worker], Future[Any]], tasks: Iterable[Work]
    ) -> None:
        """`start` has a worker start the job."""
        self._workers, self._start_job = list(workers), start
        self._tasks, self._waiting, self._losses = iter(tasks), deque[Work](), Counter[Any]()
        self._load: dict[Worker, int] = {}
        """The tasks at each worker that has started the job."""
        self._running: dict[Future[Any], Work] = {}
        self._timers = list[Timer]()
        self._ends = SimpleQueue[tuple[Worker, Future[Any]]]()

    def results(self) -> Iterator[tuple[Work, Result]]:
        """Yield each task with its result; raise the first error of a start or of a task."""
        try:
            for worker in self._workers:
                self._start(worker)
            yield from self._results()
        finally:
            for timer in self._timers:
                timer.cancel()

    def _results(self) -> Iterator[tuple[Work, Result]]:
        while self._has_next() or self._running:
            worker, future = self._ends.get()
            task = self._running.pop(future, None)
            try:
                result = worker.result(future)
            except WorkerLostError as error:
                self._lose(worker, task, error)
                continue
            if task is None or worker in self._load:
                self._load[worker] = 0 if task is None else self._load[worker] - 1
            self._fill()
            if task is not None:
                yield task, result

    def stop(self) -> None:
        """Do no further task; wait until no task runs."""
        for worker in self._workers:
            worker.close()
        wait(self._running, timeout=END_SECONDS)

    def _start(self, worker: Worker) -> None:
        self._watch(worker, self._start_job(worker))

    def _watch(self, worker: Worker, future: Future[Any]) -> None:
        future.add_done_callback(lambda ended: self._ends.put((worker, ended)))

    def _has_next(self) -> bool:
        """Return True if a task is left to hand out."""
        if not self._waiting:
            self._waiting.extend(islice(self._tasks, 1))
        return bool(self._waiting)

    def _fill(self) -> None:
        """Give tasks to the workers that have few, in turn."""
        for load in range(AHEAD):
            for worker in [worker for worker, busy in self._load.items() if busy <= load]:
                if not self._has_next():
                    return
                future = worker.send(task := self._waiting.popleft())
                self._running[future] = task
                self._load[worker] += 1
                self._watch(worker, future)

    def _lose(self, worker: Worker, task: Work | None, error: WorkerLostError) -> None:
        """Hand the task of a lost worker out again, and take another process for the worker."""
        what = worker if task is None else task
        self._losses[what] += 1
        often = self._losses[what] > RETRIES
        if task is None and often:
            self._workers.remove(worker)
        if often and (task is not None or not self._workers):
            raise OutputError(
                f"{'A process' if task is None else 'A task'} was lost {RETRIES + 1} times: {error}",
                hint="is a node short of memory? less --max-memory needs less; rerun the same command to resume",
                outcome="What is done is kept.",
            ) from error
        if task is not None:
            self._waiting.appendleft(task)
        if worker in self._workers and (task is None or self._load.pop(worker, None) is not None):
            delay = RENEW_SECONDS * self._losses[worker] if task is None else 0.0
            timer = Timer(delay, self._renew, [worker])
            self._timers.append(timer)
            timer.daemon = True
            timer.start()
        self._fill()

    def _renew(self, worker: Worker) -> None:
        worker.renew()
        self._start(worker)
