"""Check the options of a verb that runs on a cluster, and connect to the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ..cluster.address import check_address
from ..errors import UsageError
from ..settings import Settings
from ..storage.filenames import FileStates

if TYPE_CHECKING:
    from ..cluster.jobs import Cluster
    from ..cluster.ray_cluster import RayCluster
    from ..cluster.tensors import ClusterExecutor
    from ..engine.run import Executor
    from ..plan.plan import Plan

Stores = Mapping[str, str | None]
"""Folders in object stores, each with the hash of its listing if it is an input."""
NO_STORES: Stores = {}
Ask = Callable[["Plan", Path | str], AbstractContextManager[Callable[[], "Executor"]]]
"""Asks the nodes of a cluster for a plan's files and OUT; gives a function that waits until all have agreed."""


def refuse_for_cluster(options: Mapping[str, Any]) -> None:
    """Raise UsageError for an invalid address, and for options that need one machine."""
    check_address(options["cluster"])
    if options.get("in_place"):
        raise UsageError("--in-place changes a checkpoint on one machine; --cluster writes a new one.")
    if options.get("level") == "outputs":
        raise UsageError("--level outputs runs models on one machine; --cluster compares weights.")
    if not options.get("cache", True):
        raise UsageError("--no-cache removes files that the nodes of --cluster read.")


@contextmanager
def connecting(address: str, settings: Settings) -> Iterator[Callable[[], RayCluster]]:
    """Connect to a cluster in a thread, whose processes start and import torch meanwhile.

    Yields a function that waits for the connection; the connection ends with the block.
    """
    from ..cluster.ray_cluster import connected

    with ExitStack() as stack, ThreadPoolExecutor(1, "connect") as pool:
        future = pool.submit(stack.enter_context, connected(address, settings))

        def connection() -> RayCluster:
            cluster = future.result()
            settings.notify(f"cluster: {cluster}")
            return cluster

        yield connection


@contextmanager
def writing_nodes(
    address: str, inputs: Iterable[FileStates], out: Path, settings: Settings
) -> Iterator[Callable[[], ClusterExecutor]]:
    """Connect to a cluster whose nodes write the tensors of a plan; they must see the inputs and OUT's parent."""
    with connecting(address, settings) as connection, _agreeing(connection(), inputs, out, settings) as agreed:
        yield lambda: _tensor_executor(agreed())


@contextmanager
def merging_nodes(address: str, settings: Settings) -> Iterator[Ask]:
    """Connect to a cluster whose nodes write a merge's tensors, while the plan is made.

    Yields a function that takes the plan and OUT, and asks the nodes. OUT is a folder that all nodes see, or an
    address in a store or on the Hub, to which nodes upload whole shards.
    """
    with connecting(address, settings) as connection:
        yield lambda plan, out: _asked_for(connection(), plan, out, settings)


@contextmanager
def _asked_for(cluster: Cluster, plan: Plan, out: Path | str, settings: Settings) -> Iterator[Callable[[], Executor]]:
    """Ask the nodes for a plan's files; inputs, and OUT, may be in object stores."""
    from ..cluster.node_files import shared_files, stores_of

    inputs, stores = shared_files(plan), stores_of(plan)
    if isinstance(out, Path):
        with _agreeing(cluster, inputs, out, settings, stores) as agreed:
            yield lambda: _tensor_executor(agreed())
        return
    with _agreeing(cluster, inputs, None, settings, {**stores, out: None}) as agreed:

        def uploading() -> Executor:
            from ..cluster.shards import ShardExecutor

            return ShardExecutor(agreed())

        yield uploading


def _tensor_executor(cluster: Cluster) -> ClusterExecutor:
    from ..cluster.tensors import ClusterExecutor

    return ClusterExecutor(cluster)


@contextmanager
def nodes_that_see(
    address: str, inputs: Iterable[FileStates], out: Path | None, settings: Settings
) -> Iterator[Callable[[], Cluster]]:
    """Connect to a cluster; every node must see the inputs, and the folder that `out` is made in, if any.

    Yields a function that waits until all nodes have agreed, and returns the cluster.
    """
    with connecting(address, settings) as connection, _agreeing(connection(), inputs, out, settings) as agreed:
        yield agreed


@contextmanager
def _agreeing(
    cluster: Cluster, inputs: Iterable[FileStates], out: Path | None, settings: Settings, stores: Stores = NO_STORES
) -> Iterator[Callable[[], Cluster]]:
    """Ask all nodes if they see the inputs and `out`, and reach `stores` with the files that this machine has found.

    Yields a function that waits until all nodes have agreed, and returns the cluster.
    """
    from ..cluster.jobs import asked_nodes

    token = None
    if out:
        parent = next(parent for parent in out.parents if parent.is_dir())
        token = parent / f".{out.name}.{uuid4().hex[:8]}.token"
    paths = [path for states in inputs for path in states]
    with asked_nodes(cluster, paths, token, settings, stores) as check:

        def agreed() -> Cluster:
            check()
            return cluster

        yield agreed
