"""A stand-in for a Ray cluster: it pickles all that a cluster would send, and runs in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from dora_convert.cluster import ray_cluster
from dora_convert.cluster.jobs import NodeFacts
from dora_convert.cluster.node import end
from dora_convert.errors import OutputError
from dora_convert.output.finished import Verdict
from dora_convert.parity.self_check import SelfCheck


def sent(value):
    """A value as another machine would get it."""
    buffers = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])


@dataclass
class StandIn:
    """Two nodes, in this process; the second one answers with `facts`, and after `allowed` tasks all is lost."""

    facts: dict = field(default_factory=dict)
    allowed: int = 10**9
    gpus: int = 0
    slots: int = 1000
    done: list = field(default_factory=list)

    def map(self, job, tasks, *, withdraw=None):
        nodes = [sent(job).start(), sent(job).start()]
        try:
            for number, task in enumerate(tasks):
                if len(self.done) >= self.allowed:
                    if withdraw:
                        withdraw()
                        with pytest.raises(OutputError, match="belongs to another run now"):
                            nodes[0](task)
                    raise KeyboardInterrupt
                result = sent(nodes[number % 2](sent(task)))
                self.done.append(task)
                yield task, result
        finally:
            for node in nodes:
                end(node)

    def ask(self, question, late=None) -> Callable[[], list[NodeFacts]]:
        facts = sent(question)()
        sent(late)()
        return lambda: [facts, replace(facts, name="second", **self.facts)]


def connected_to(stand_in: StandIn, monkeypatch) -> StandIn:
    """Have --cluster connect to a stand-in."""

    @contextmanager
    def connected(address, _):
        yield stand_in

    monkeypatch.setattr(ray_cluster, "connected", connected)
    return stand_in


def find_wrong(name: str, monkeypatch) -> None:
    """Have the self-check of every node find the written tensor of a name wrong."""
    check = SelfCheck.check_all

    def wrong(self, finished, *words):
        verdicts = check(self, finished, *words)
        return [
            Verdict(10, 10) if item.name == name else each for (item, _), each in zip(finished, verdicts, strict=True)
        ]

    monkeypatch.setattr(SelfCheck, "check_all", wrong)
