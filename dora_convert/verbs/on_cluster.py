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
    from ..engine.run import Executor
    from ..plan.plan import Plan

Stores = Mapping[str, str | None]
"""Folders in object stores, each with the hash of its listing if it is an input."""
NO_STORES: Stores = {}


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
    address: str, inputs: Iterable[FileStates], out: Path, settings: Settings, stores: Stores = NO_STORES
) -> Iterator[Callable[[], ClusterExecutor]]:
    """Connect to a cluster whose nodes write the tensors of a plan; they must see the inputs and OUT's parent."""
    with nodes_that_see(address, inputs, out, settings, stores) as agreed:

        def executor() -> ClusterExecutor:
            from ..cluster.tensors import ClusterExecutor

            return ClusterExecutor(agreed())

        yield executor


@contextmanager
def merging_nodes(address: str, plan: Plan, out: Path | str, settings: Settings) -> Iterator[Callable[[], Executor]]:
    """Connect to a cluster whose nodes write a merge's tensors; inputs, and OUT, may be in object stores.

    `out` is a folder that all nodes see, or the address of one in a store, into which nodes upload whole shards.
    """
    from ..cluster.node_files import shared_files, stores_of

    inputs = shared_files(plan)
    if isinstance(out, Path):
        with writing_nodes(address, inputs, out, settings, stores_of(plan)) as executor:
            yield executor
        return
    with nodes_that_see(address, inputs, None, settings, {**stores_of(plan), out: None}) as agreed:

        def uploading() -> Executor:
            from ..cluster.shards import ShardExecutor

            return ShardExecutor(agreed(), out)

        yield uploading


@contextmanager
def nodes_that_see(
    address: str, inputs: Iterable[FileStates], out: Path | None, settings: Settings, stores: Stores = NO_STORES
) -> Iterator[Callable[[], Cluster]]:
    """Connect to a cluster; every node must see the inputs, and the folder that `out` is made in, if any.

    Every node must also reach `stores`, and find the files in them that this machine has found.

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
        with asked_nodes(cluster, paths, token, settings, stores) as check:

            def agreed() -> Cluster:
                check()
                return cluster

            yield agreed
