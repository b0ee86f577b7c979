"""A worker of the dispatch in a process of a node: an actor of Ray."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import Any, cast

from .dispatch import WorkerLostError
from .node import NodeProcess


class ProcessWorker:
    """A worker in a process of a node, an actor of Ray."""

    def __init__(self, node: dict[str, Any], kind: str) -> None:
        """Start the process, with a processor, and with a GPU if `kind` says so."""
        self.node, self._kind = node, kind
        self.late: Callable[[], None] | None = None
        """Called in a new process, which may be on a node that was not asked."""
        self._renewed = False
        self.actor = self._started()

    def renew(self) -> None:
        """Start another process, on another node if this one is lost."""
        self.actor, self._renewed = self._started(), True

    def _started(self) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        gpus = 1 if self._kind == "GPU" else 0
        strategy = NodeAffinitySchedulingStrategy(self.node["NodeID"], soft=True)
        return _process_class().options(num_cpus=1, num_gpus=gpus, scheduling_strategy=strategy).remote(alone=True)

    def start(self, job: Any) -> Future[Any]:
        """Start a job, which Ray holds."""
        late = self.late if self._renewed else None
        return cast("Future[Any]", self.actor.start.remote(job, late).future())

    def send(self, task: Any) -> Future[Any]:
        """Do a task after all that were sent before."""
        return cast("Future[Any]", self.actor.do.remote(task).future())

    def result(self, future: Future[Any]) -> Any:
        """Return what a start or a task returned, or raise its error, or WorkerLostError."""
        import ray

        try:
            return future.result()
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise WorkerLostError(last_line(error)) from error

    def close(self) -> None:
        """Do nothing: a task that was withdrawn ends at once."""


@cache
def _process_class() -> Any:
    """Return the actor's class, which Ray sends to the cluster once for all processes."""
    import ray

    return ray.remote(NodeProcess)


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
