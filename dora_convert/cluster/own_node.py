"""Say which workers the nodes get; reserve the processors of this process's own node for threads of this process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..settings import MOST_WORKERS, processors

RESERVE_SECONDS = 1
"""A node that is not free within this time is busy with other work, and gets processes like any other node."""


class OwnNode:
    """The node that this process runs on, with processors that Ray gives to nobody else."""

    def __init__(self, node: Any, group: Any, workers: int) -> None:
        self.node, self._group = node, group
        self.workers = workers
        """The number of threads of this process that do tasks."""

    @classmethod
    def reserved(cls, nodes: Iterable[Any]) -> OwnNode | None:
        """Reserve processors of the node for some threads; None if this process is on no node, or on a busy one."""
        import ray

        here = own_id()
        for node in nodes:
            count = min(int(node["Resources"].get("CPU", 0)), processors(), MOST_WORKERS)
            if node["NodeID"] == here and count:
                group = ray.util.placement_group([{"CPU": count}], bundle_label_selector=[{"ray.io/node-id": here}])
                if group.wait(RESERVE_SECONDS):
                    return cls(node, group, count)
                ray.util.remove_placement_group(group)
        return None

    def release(self) -> None:
        """Give the processors back to Ray."""
        import ray

        ray.util.remove_placement_group(self._group)


def own_id() -> str | None:
    """Return the id of the node that this process runs on; None through Ray Client."""
    import ray
    from ray.util.client import ray as client

    return None if client.is_connected() else ray.get_runtime_context().get_node_id()


def workers_of(nodes: Sequence[Any], kind: str, own: OwnNode | None, *, shared: bool) -> list[tuple[Any, int]]:
    """Return each node with the number of processes that do its tasks; `own` has threads that do some.

    If processors are `shared`, the nodes at the address of this machine get together a process for each processor.
    """
    here = own_id() if shared else None
    address = next((node["NodeManagerAddress"] for node in nodes if node["NodeID"] == here), None)
    left = processors() - (own.workers if own else 0)
    counts = []
    for node in nodes:
        count = int(node["Resources"].get(kind, 0)) - (own.workers if own and node is own.node else 0)
        if kind == "CPU" and node["NodeManagerAddress"] == address:
            count = min(count, left)
            left -= count
        counts.append((node, count))
    return counts
