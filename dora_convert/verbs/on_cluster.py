"""Check the options of a verb that runs on a cluster, and connect to the cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..adapters import Adapter
from ..cluster import on_cluster
from ..errors import UsageError
from ..output.folder import OutputFolder
from ..settings import Settings
from ..storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ..cluster.tensors import ClusterExecutor


def refuse_for_cluster(options: Mapping[str, Any]) -> None:
    """Raise UsageError for an invalid address, and for options that need one machine."""
    from ..cluster.ray_cluster import parse_address

    parse_address(options["cluster"])
    if options.get("in_place"):
        raise UsageError("--in-place changes a checkpoint on one machine; --cluster writes a new one.")
    if options.get("no_local"):
        raise UsageError("--no-local keeps no file that the nodes of --cluster could share.", hint="name an OUT")
    if not options.get("cache", True):
        raise UsageError("--no-cache removes files that the nodes of --cluster read.")


def executor_for(
    address: str,
    checkpoints: Iterable[Checkpoint],
    adapters: Iterable[Adapter],
    folder: OutputFolder,
    settings: Settings,
) -> AbstractContextManager[ClusterExecutor]:
    """Return the connection to a cluster whose nodes see all inputs, and the folder that OUT is made in."""
    states = [*(checkpoint.states for checkpoint in checkpoints), *(adapter.states for adapter in adapters)]
    return on_cluster(address, [path for each in states for path in each], folder.out, settings)
