"""Run tasks on the nodes of a cluster, with Ray; Ray alone schedules, retries and carries results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from ..settings import Settings

if TYPE_CHECKING:
    from .jobs import Cluster
    from .tensors import ClusterExecutor


@contextmanager
def on_cluster(address: str, inputs: Iterable[Path], out: Path, settings: Settings) -> Iterator[ClusterExecutor]:
    """Yield the executor of `--cluster`, once every node has shown that it sees the inputs and OUT's folder."""
    from .ray_cluster import connected

    with connected(address, settings) as cluster:
        from .tensors import ClusterExecutor

        check(cluster, inputs, out, settings)
        yield ClusterExecutor(cluster)


def check(cluster: Cluster, inputs: Iterable[Path], out: Path, settings: Settings) -> None:
    """Raise UsageError if a node does not see the inputs, or the folder that `out` will be made in."""
    from .jobs import check_nodes

    parent = next(parent for parent in out.parents if parent.is_dir())
    check_nodes(cluster, inputs, parent / f".{out.name}.{uuid4().hex[:8]}.token", settings)
