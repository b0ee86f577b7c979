"""Define the protocol between a run and its output: a new folder, or the base's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..plan.item import Item
from ..plan.plan import Plan
from ..storage.checkpoint import Checkpoint
from ..storage.reader import Reader
from .shards import ShardFiles


class Output(Protocol):
    """A folder that a run fills: an `OutputFolder` beside the base, or the base itself as `InPlace`."""

    WAY_OUT: str
    """The hint after an unfinished run of something else."""
    in_place: bool
    """True if the run overwrites its own input, so that all errors must show before the first write."""
    given: str
    """OUT as the caller wrote it."""
    out: Path
    """OUT as an absolute path."""
    partial: Path
    """The folder that the weights are written into."""
    state: Path
    """The folder of journal, spool and lock."""
    overwrite: bool
    """True if an unfinished run of something else may be removed."""

    def identity(self, bases: Sequence[Checkpoint]) -> Mapping[str, Any]:
        """Return JSON values that identify this run's inputs among others with the same headers."""

    def prepare(self, item: Item, reader: Reader) -> Item:
        """Return the item with a source that is safe to read while the item is written."""

    def settled(self, item: Item) -> None:
        """Note that a tensor is written, synced and entered in the journal."""

    def open_shards(self, plan: Plan, *, new: bool, sparse: bool = False) -> ShardFiles:
        """Open the files that tensors are written into."""

    def bytes_needed(self, plan: Plan) -> int:
        """Return the bytes that a plan's weights take on the disk."""

    def check_space(self, nbytes: int) -> None:
        """Refuse a disk without so many free bytes."""

    def open(self) -> None:
        """Create or enter the folder, and lock it."""

    def resumable(self, plan: Plan) -> bool:
        """Return True if all files of an unfinished run exist."""

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove the files of an unfinished run, except the names in `keep`."""

    def path(self, name: str) -> Path:
        """Return the path that a file beside the weights is written to."""

    def put(self, name: str, source: bytes | Path) -> None:
        """Write a small file, or copy one."""

    def sync(self) -> None:
        """Sync names and small files to the disk."""

    def publish(self, report: Mapping[str, Any], removed: Sequence[str] = ()) -> None:
        """Give everything its final name; `removed` are files of the base that the result does not have."""

    def leave(self) -> None:
        """Unlock, and keep everything for the same command to resume."""

    def discard(self) -> None:
        """Unlock, and remove a run that is not worth resuming."""
