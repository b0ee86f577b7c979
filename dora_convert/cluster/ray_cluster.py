"""Do jobs on a Ray cluster: an existing one, or one that is started on this machine."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any

from ..errors import UsageError
from ..settings import Settings, require_extra
from ..torch_import import ends_at_once, own_process
from .address import LOCAL
from .dispatch import Dispatch, ThreadWorker, Worker
from .jobs import NodeFacts, NodeJob, Result, Work
from .node import answer
from .own_node import OwnNode, workers_of
from .process_worker import ProcessWorker, last_line

BUSY_SECONDS = 15
"""A node whose processors are all taken for so long is asked by a process that needs none."""
END_SECONDS = 5
"""The time for processes to remove what they have downloaded; what stays is removed by the next run on the node."""
ANSWER_SECONDS = 120
"""A node that does not start such a process within this time ends the run."""
GOODBYE_SECONDS = 0.03
"""The time to tell the cluster that this process ends. Ray's threads then need a quarter of a second to end."""


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
        cluster = None
        try:
            cluster = RayCluster(settings.device, takes_part=not LOCAL.fullmatch(address))
            yield cluster
        except BaseException:
            if mine:
                ray.shutdown()
            raise
        else:
            if mine:
                _disconnect(at_once=own_process[0] and address == "auto")
        finally:
            if not mine and cluster is not None:
                cluster.close()


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
            hint="ray start --head starts one; RAY_AUTH_MODE=token if it has tokens; --cluster local needs none",
        ) from error


def _disconnect(*, at_once: bool) -> None:
    """Leave the cluster, or stop it if it is ours; with `at_once` when this process ends, without a wait."""
    import ray

    if not at_once:
        ray.shutdown()
        return
    atexit.unregister(ray.shutdown)
    atexit.register(_say_goodbye)


def _say_goodbye() -> None:
    """Leave the cluster; if this process ends at once, do not wait for Ray's threads, and touch nothing of Ray."""
    import ray

    leaving = threading.Thread(target=ray.shutdown, name="goodbye", daemon=True)
    leaving.start()
    leaving.join(GOODBYE_SECONDS if ends_at_once[0] else None)


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

    def __init__(self, device: str, *, takes_part: bool) -> None:
        """Start a process for each processor, or for each GPU if the nodes have some and `device` is not cpu.

        If this process `takes_part`, threads of it do tasks of its own node, and the nodes on this machine share its
        processors.
        """
        import ray

        self._ray = ray
        alive = [node for node in ray.nodes() if node["Alive"]]
        self._nodes = [node for node in alive if node["Resources"].keys() & {"CPU", "GPU"}]
        kind = "GPU" if self.gpus and device != "cpu" else "CPU"
        self._own = OwnNode.reserved(self._nodes) if takes_part and kind == "CPU" else None
        counts = workers_of(self._nodes, kind, self._own, shared=takes_part)
        self._processes = [ProcessWorker(node, kind) for node, count in counts for _ in range(count)]
        self._standing_by = {node["NodeID"] for node, count in counts if takes_part and not count}

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPUs" if self.gpus else ""
        return f"{len(self._nodes)} nodes, {self._count('CPU')} processors{gpus} (Ray {self._ray.__version__})"

    def _count(self, resource: str) -> int:
        return int(sum(node["Resources"].get(resource, 0) for node in self._nodes))

    @property
    def slots(self) -> int:
        """The number of tasks that run at once."""
        return len(self._processes) + (self._own.workers if self._own else 0)

    @property
    def gpus(self) -> int:
        """The number of GPUs of all nodes."""
        return self._count("GPU")

    def map(
        self, job: NodeJob[Work, Result], tasks: Iterable[Work], *, withdraw: Callable[[], None] | None = None
    ) -> Iterator[tuple[Work, Result]]:
        """Yield each task with its result, as `Cluster.map` says."""
        from ..engine.precision import exact_arithmetic

        shared = self._ray.put(job)
        threads = [ThreadWorker() for _ in range(self._own.workers if self._own else 0)]

        def start(worker: Worker) -> Future[Any]:
            return worker.start(job) if isinstance(worker, ThreadWorker) else worker.start(shared)

        dispatch = Dispatch[Work, Result]([*threads, *self._processes], start, tasks)
        try:
            with exact_arithmetic() if threads else nullcontext():
                yield from dispatch.results()
        except BaseException:
            if withdraw:
                withdraw()
                dispatch.stop()
            raise
        finally:
            for thread in threads:
                thread.close()
        ends = [process.actor.end.remote() for process in self._processes]
        self._ray.wait(ends, num_returns=len(ends), timeout=END_SECONDS)

    def ask(
        self, question: Callable[[], NodeFacts], late: Callable[[], None] | None = None
    ) -> Callable[[], list[NodeFacts]]:
        """Ask every node; return a function that waits for the answers, UsageError for a node without one.

        A node that stands by is not asked. It runs `late` when it takes a lost process's place.
        """
        processes = {process.node["NodeID"]: process for process in self._processes}
        for each in self._processes:
            each.late = late
        asked = {}
        for node in self._nodes:
            if node["NodeID"] in self._standing_by or (self._own and node is self._own.node):
                continue
            process = processes.get(node["NodeID"])
            asked[process.actor.answer.remote(question) if process else self._call(node, question)] = node
        return lambda: [*([question()] if self._own else []), *self._answers(asked, question)]

    def _call(self, node: dict[str, Any], question: Callable[[], Any]) -> Any:
        """Ask a process of a node that needs no free processor."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(answer).remote(question)

    def _answers(self, asked: dict[Any, Any], question: Callable[[], NodeFacts]) -> list[NodeFacts]:
        """Wait for answers; a node whose process has not started by then, or is lost, is asked once more."""
        silent = set(self._ray.wait(list(asked), num_returns=len(asked), timeout=BUSY_SECONDS)[1]) if asked else set()
        facts = []
        for reference, node in list(asked.items()):
            if reference not in silent:
                try:
                    facts.append(self._ray.get(reference))
                    continue
                except self._ray.exceptions.ActorDiedError:
                    pass
                except self._ray.exceptions.RayError as error:
                    raise _cannot_run(node, error) from error
            facts.append(self._answer(node, self._call(node, question)))
        return facts

    def _answer(self, node: dict[str, Any], reference: Any) -> NodeFacts:
        try:
            facts: NodeFacts = self._ray.get(reference, timeout=ANSWER_SECONDS)
        except self._ray.exceptions.GetTimeoutError:
            raise UsageError(f"Node {_name(node)} of the cluster does not answer.", hint="ray status") from None
        except self._ray.exceptions.RayError as error:
            raise _cannot_run(node, error) from error
        return facts

    def close(self) -> None:
        """End the processes, and give this node's processors back: the program keeps its connection."""
        for process in self._processes:
            self._ray.kill(process.actor)
        if self._own:
            self._own.release()


def _cannot_run(node: dict[str, Any], error: Exception) -> UsageError:
    return UsageError(
        f"Node {_name(node)} of the cluster cannot run dora-convert: {last_line(error)}",
        hint="install the same dora-convert, torch and Python on every node",
    )


def _name(node: dict[str, Any]) -> str:
    return str(node.get("NodeManagerHostname") or node.get("NodeManagerAddress"))
