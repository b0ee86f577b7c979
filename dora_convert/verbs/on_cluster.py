"""Check the options of a verb that runs on a cluster, and connect to the cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ..cluster.address import check_address
from ..errors import UsageError
from ..output.folder import OutputFolder
from ..settings import Settings
from ..storage.filenames import FileStates

if TYPE_CHECKING:
    from ..cluster.tensors import ClusterExecutor


def refuse_for_cluster(options: Mapping[str, Any]) -> None:
    """Raise UsageError for an invalid address, and for options that need one machine."""
    check_address(options["cluster"])
    if options.get("in_place"):
        raise UsageError("--in-place changes a checkpoint on one machine; --cluster writes a new one.")
    if options.get("no_local"):
        raise UsageError("--no-local keeps no file that the nodes of --cluster could share.", hint="name an OUT")
    if not options.get("cache", True):
        raise UsageError("--no-cache removes files that the nodes of --cluster read.")


@contextmanager
def executor_for(
    address: str, inputs: Iterable[FileStates], folder: OutputFolder, settings: Settings
) -> Iterator[ClusterExecutor]:
    """Connect to a cluster; every node must see the inputs, and the folder that OUT is made in."""
    from ..cluster.ray_cluster import connected

    with connected(address, settings) as cluster:
        from ..cluster.jobs import check_nodes
        from ..cluster.tensors import ClusterExecutor

        files: list[Path] = [path for states in inputs for path in states]
        parent = next(parent for parent in folder.out.parents if parent.is_dir())
        check_nodes(cluster, files, parent / f".{folder.out.name}.{uuid4().hex[:8]}.token", settings)
        yield ClusterExecutor(cluster)
