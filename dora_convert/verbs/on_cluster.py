"""Check the options of a verb that runs on a cluster, and connect to the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ..cluster.address import check_address
from ..errors import UsageError
from ..settings import Settings
from ..storage.filenames import FileStates

if TYPE_CHECKING:
    from ..cluster.jobs import Cluster
    from ..cluster.tensors import ClusterExecutor


def refuse_for_cluster(options: Mapping[str, Any]) -> None:
    """Raise UsageError for an invalid address, and for options that need one machine."""
    check_address(options["cluster"])
    if options.get("in_place"):
        raise UsageError("--in-place changes a checkpoint on one machine; --cluster writes a new one.")
    if options.get("no_local"):
        raise UsageError("--no-local keeps no file that the nodes of --cluster could share.", hint="name an OUT")
    if options.get("level") == "outputs":
        raise UsageError("--level outputs runs models on one machine; --cluster compares weights.")
    if not options.get("cache", True):
        raise UsageError("--no-cache removes files that the nodes of --cluster read.")


@contextmanager
def writing_nodes(
    address: str, inputs: Iterable[FileStates], out: Path, settings: Settings
) -> Iterator[Callable[[], ClusterExecutor]]:
    """Connect to a cluster whose nodes write the tensors of a plan; they must see the inputs and OUT's parent."""
    with nodes_that_see(address, inputs, out, settings) as agreed:

        def executor() -> ClusterExecutor:
            from ..cluster.tensors import ClusterExecutor

            return ClusterExecutor(agreed())

        yield executor


@contextmanager
def nodes_that_see(
    address: str, inputs: Iterable[FileStates], out: Path | None, settings: Settings
) -> Iterator[Callable[[], Cluster]]:
    """Connect to a cluster; every node must see the inputs, and the folder that `out` is made in, if any.

    The processes of the nodes start meanwhile, and import torch. Yields a function that waits until all nodes have
    agreed, and returns the cluster.
    """
    from ..cluster.jobs import asked_nodes
    from ..cluster.ray_cluster import connected

    with connected(address, settings) as cluster:
        token = None
        if out:
            parent = next(parent for parent in out.parents if parent.is_dir())
            token = parent / f".{out.name}.{uuid4().hex[:8]}.token"
        paths = [path for states in inputs for path in states]
        with asked_nodes(cluster, paths, token, settings) as check:

            def agreed() -> Cluster:
                check()
                return cluster

            yield agreed
