"""Run in the processes of a cluster's nodes; importing this module is cheap, torch follows in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..torch_import import own_process, without_collections
from .jobs import NodeWork


class NodeProcess:
    """A process of a node: it imports torch at once, starts jobs, and does their tasks."""

    def __init__(self, *, alone: bool = False) -> None:
        """With `alone`, no other code runs in this process."""
        own_process[0] |= alone
        self._do: Callable[[Any], Any] | None = None
        threading.Thread(target=_import_torch, name="torch", daemon=True).start()

    def answer(self, question: Callable[[], Any]) -> Any:
        """Answer a question about this node, which needs no torch."""
        return question()

    def start(self, job: Any, check: Callable[[], None] | None = None) -> None:
        """Start a job, after a `check` of this node if any; further tasks are tasks of this job."""
        if check:
            check()
        self._do = job.start()

    def end(self) -> None:
        """End the job that was started last."""
        end(self._do)
        self._do = None

    def do(self, task: Any) -> Any:
        """Do a task of the job that was started last."""
        assert self._do
        return self._do(task)


def end(work: Callable[[Any], Any] | None) -> None:
    """Close what a job's work holds."""
    if isinstance(work, NodeWork):
        work.close()


def _import_torch() -> None:
    with without_collections(numpy=False):
        import_module("torch")
        import_module("..engine.workers", __package__)


def answer(question: Callable[[], Any]) -> Any:
    """Answer a question about the node that this function is called on."""
    return question()
