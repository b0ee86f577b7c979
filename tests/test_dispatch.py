"""Dispatch: tasks go to workers that may be lost, and each task's result comes once."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future

import pytest

from dora_convert.cluster import dispatch, jobs, own_node
from dora_convert.cluster.dispatch import Dispatch, ThreadWorker, WorkerLostError
from dora_convert.cluster.node import NodeProcess
from dora_convert.errors import OutputError, UsageError


class Squares:
    """A job: squares of numbers; some numbers fail."""

    def start(self):
        return self.square

    @staticmethod
    def square(number: int) -> int:
        if number < 0:
            raise ValueError(number)
        return number * number


class Mortal(ThreadWorker):
    """A worker that is lost after some tasks, as often as `lives` says."""

    def __init__(self, tasks: int, lives: int) -> None:
        super().__init__()
        self.tasks, self.lives, self.left = tasks, lives, tasks

    def send(self, task) -> Future:
        self.left -= 1
        if self.left < 0 and self.lives > 0:
            gone: Future = Future()
            gone.set_exception(WorkerLostError("power cut"))
            return gone
        return super().send(task)

    def renew(self) -> None:
        self.lives, self.left = self.lives - 1, self.tasks


def run(workers, tasks):
    """The results of all tasks, by task."""
    work = Dispatch(workers, lambda worker: worker.start(Squares()), tasks)
    try:
        pairs = list(work.results())
    finally:
        work.stop()
    assert max(Counter(task for task, _ in pairs).values()) == 1
    return dict(pairs)


@pytest.mark.parametrize("lives", [0, 1, 3])
def test_tasks_of_a_lost_worker_are_done_elsewhere(lives):
    """Each task has its result once, whoever did it."""
    tasks = range(50)
    assert run([ThreadWorker(), Mortal(4, lives)], tasks) == {task: task * task for task in tasks}


def test_a_worker_alone_is_renewed():
    """Another process takes its place, and starts the job anew."""
    assert run([Mortal(2, 5)], range(20)) == {task: task * task for task in range(20)}


def test_tasks_that_kill_every_worker():
    """The run ends after some losses, and says what to do."""
    with pytest.raises(OutputError, match=f"was lost {dispatch.RETRIES + 1} times: power cut") as caught:
        run([Mortal(0, 1000)], range(3))
    assert "resume" in caught.value.hint


def test_the_first_error_ends_the_run():
    """It is the task's own error."""
    with pytest.raises(ValueError, match="-7"):
        run([ThreadWorker(), ThreadWorker()], [*range(20), -7, *range(20, 40)])


class Stillborn(ThreadWorker):
    """A worker that never starts."""

    def start(self, job) -> Future:  # noqa: ARG002
        gone: Future = Future()
        gone.set_exception(WorkerLostError("no memory"))
        return gone


def test_a_worker_that_never_starts_is_given_up(monkeypatch):
    """Others do all tasks; without others the run ends."""
    monkeypatch.setattr(dispatch, "RENEW_SECONDS", 0.001)
    assert run([Stillborn(), ThreadWorker()], range(9)) == {task: task * task for task in range(9)}
    with pytest.raises(OutputError, match="A process was lost"):
        run([Stillborn(), Stillborn()], range(9))


def test_nodes_of_one_machine_share_its_processors(monkeypatch):
    """A process for each processor, less the threads of this process; other machines get what Ray says."""
    monkeypatch.setattr(own_node, "own_id", lambda: "a")
    monkeypatch.setattr(own_node, "processors", lambda: 6)
    nodes = [
        {"NodeID": name, "NodeManagerAddress": address, "Resources": {"CPU": count, "GPU": 1}}
        for name, address, count in (("a", "here", 5), ("b", "here", 3), ("c", "here", 2), ("d", "there", 64))
    ]

    def counts(kind, own=None, *, shared=True):
        return [count for _, count in own_node.workers_of(nodes, kind, own, shared=shared)]

    assert counts("CPU") == [5, 1, 0, 64]
    assert counts("CPU", own_node.OwnNode(nodes[0], None, 4)) == [1, 1, 0, 64]
    assert counts("GPU") == [1, 1, 1, 1]
    assert counts("CPU", shared=False) == [5, 3, 2, 64]
    monkeypatch.setattr(own_node, "own_id", lambda: None)
    assert counts("CPU") == [5, 3, 2, 64]


def test_a_process_that_takes_a_lost_ones_place_is_checked():
    """It may be on a node that was not asked, and says so before it starts the job."""
    head = jobs.NodeCheck({__file__: "another file"})
    process = NodeProcess()
    with pytest.raises(UsageError, match=r"does not see .*test_dispatch.py as this machine does"):
        process.start(Squares(), jobs.LateCheck(head))
    process.start(Squares(), jobs.LateCheck(jobs.NodeCheck({})))
    assert process.do(3) == 9
    with pytest.raises(UsageError, match="the command's machine has torch 0"):
        jobs.LateCheck(jobs.NodeCheck({}), ("torch 0",))()
