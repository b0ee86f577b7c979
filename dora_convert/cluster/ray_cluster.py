"""Do jobs on a Ray cluster: an existing one, or one that is started on this machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..errors import DoraConvertError, OutputError, UsageError
from ..settings import Settings, require_extra
from .address import LOCAL

if TYPE_CHECKING:
    from .jobs import NodeFacts, NodeJob, Result, Work

RETRIES = 5
"""Nodes or processes that one task may lose before the run fails."""
AHEAD = 4
"""Tasks that wait or run for each processor: enough that none is idle, and few to wait for after an error."""
ANSWER_SECONDS = 120
"""A node that does not start a process within this time does not take part."""
END_SECONDS = 60
"""The time for running tasks to end after an error."""


@contextmanager
def connected(address: str, settings: Settings) -> Iterator[RayCluster]:
    """Connect to a cluster, or start one on this machine; disconnect, or stop it, at the end.

    A program that has connected already keeps its connection. Raises UsageError without Ray, and for a cluster
    that does not answer.
    """
    require_extra("ray", "--cluster")
    import ray

    mine = not ray.is_initialized()
    with _same_signals():
        if mine:
            _connect(address, settings.workers)
        try:
            cluster = RayCluster()
            settings.notify(f"cluster: {cluster}")
            yield cluster
        finally:
            if mine:
                ray.shutdown()


def _connect(address: str, workers: int) -> None:
    """Connect to the cluster at an address; `local` starts one with a processor for each worker."""
    import ray

    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    local = LOCAL.fullmatch(address)
    try:
        if local:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init("local", num_cpus=int(local[1] or workers), include_dashboard=False, **quiet)
        else:
            ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = "on this machine" if address == "auto" or local else f"at {address}"
        raise UsageError(
            f"No Ray cluster answers {where}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="ray start --head starts one; --cluster local needs none",
        ) from error


@contextmanager
def _same_signals() -> Iterator[None]:
    """Put the caller's signal handlers back: Ray sets its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


class RayCluster:
    """The Ray cluster that this process is connected to."""

    def __init__(self) -> None:
        import ray

        self._ray = ray
        alive = [node for node in ray.nodes() if node["Alive"]]
        self._nodes = [node for node in alive if node["Resources"].keys() & {"CPU", "GPU"}]

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPUs" if self.gpus else ""
        return f"{len(self._nodes)} nodes, {self._count('CPU')} processors{gpus} (Ray {self._ray.__version__})"

    def _count(self, resource: str) -> int:
        return int(sum(node["Resources"].get(resource, 0) for node in self._nodes))

    @property
    def slots(self) -> int:
        """The number of tasks that run at once: a processor or a GPU for each."""
        return max(1, self.gpus or self._count("CPU"))

    @property
    def gpus(self) -> int:
        """The number of GPUs of all nodes."""
        return self._count("GPU")

    def map(
        self,
        job: NodeJob[Work, Result],
        tasks: Iterable[Work],
        *,
        gpu: bool = False,
        withdraw: Callable[[], None] | None = None,
    ) -> Iterator[tuple[Work, Result]]:
        """Yield each task with its result, as `Cluster.map` says."""
        ray = self._ray
        call = ray.remote(
            num_cpus=1,
            num_gpus=1 if gpu else 0,
            max_retries=RETRIES,
            retry_exceptions=False,
            scheduling_strategy="SPREAD",
        )(_do)
        shared, left = ray.put(job), iter(tasks)
        most = AHEAD * max(1, self.gpus if gpu else self._count("CPU"))
        running: dict[Any, Work] = {}
        try:
            while True:
                for task in islice(left, most - len(running)):
                    running[call.remote([shared], task)] = task
                if not running:
                    return
                for reference in ray.wait(list(running), num_returns=1)[0]:
                    result = _result(reference)
                    yield running.pop(reference), result
        except BaseException:
            if withdraw:
                withdraw()
                _wait_for_end(list(running))
            raise

    def ask(self, question: Callable[[], NodeFacts]) -> list[NodeFacts]:
        """Return the answer of every node; UsageError for a node that does not answer."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        call = self._ray.remote(num_cpus=0, max_retries=0)(_answer)
        asked = {
            call.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                question
            ): node
            for node in self._nodes
        }
        ready, late = self._ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS) if asked else ([], [])
        for reference in late:
            raise UsageError(f"Node {_name(asked[reference])} of the cluster does not answer.", hint="ray status")
        return [self._answer(asked[reference], reference) for reference in ready]

    def _answer(self, node: dict[str, Any], reference: Any) -> NodeFacts:
        try:
            facts: NodeFacts = self._ray.get(reference)
        except DoraConvertError:
            raise
        except self._ray.exceptions.RayError as error:
            raise UsageError(
                f"Node {_name(node)} of the cluster cannot run dora-convert: {_last_line(error)}",
                hint="install the same dora-convert, torch and Python on every node",
            ) from error
        return facts


def _name(node: dict[str, Any]) -> str:
    return str(node.get("NodeManagerHostname") or node.get("NodeManagerAddress"))


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _result(reference: Any) -> Any:
    """Return what a task returned, or raise its own error."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise OutputError(
            f"A task was lost {RETRIES + 1} times with the process that did it: {_last_line(error)}",
            hint="is a node short of memory? less --max-memory needs less; rerun the same command to resume",
            outcome="What is done is kept.",
        ) from error


def _wait_for_end(references: list[Any]) -> None:
    """Wait until no task runs.

    ray.cancel is not used: Ray 2.60 aborts the program if a task ends while it is cancelled.
    """
    import ray

    if references and ray.is_initialized():
        with suppress(ray.exceptions.RayError):
            ray.wait(references, num_returns=len(references), timeout=END_SECONDS)


_STARTED: dict[Any, Callable[[Any], Any]] = {}
"""In a process of a node: the job that was started last."""


def _do(shared: list[Any], task: Any) -> Any:
    """Do a task on a node, with the job that this process has started for it."""
    import ray

    if shared[0] not in _STARTED:
        _STARTED.clear()
        _STARTED[shared[0]] = ray.get(shared[0]).start()
    return _STARTED[shared[0]](task)


def _answer(question: Callable[[], Any]) -> Any:
    return question()
