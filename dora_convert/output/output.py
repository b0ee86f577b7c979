"""What an output does for a run, beside the base or in its place: a protocol with two implementations."""

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
    """A folder that a run fills: `OutputFolder` beside the base, or `InPlace`."""

    WAY_OUT: str
    """What to do about an unfinished run of something else."""
    in_place: bool
    """True if tensors are overwritten: what cannot be made must show before the first one is."""
    given: str
    """OUT as the caller wrote it."""
    out: Path
    partial: Path
    """The folder that files are written into."""
    record: Path
    """The folder of journal, spool and lock."""
    overwrite: bool

    def identity(self, bases: Sequence[Checkpoint]) -> Mapping[str, Any]:
        """Return what tells this run's inputs from others with the same headers, as JSON values."""

    def prepare(self, item: Item, reader: Reader) -> Item:
        """Return the item to make, whose source is safe to read while its place is overwritten."""

    def settled(self, item: Item) -> None:
        """Note that a tensor is written, synced and entered in the journal."""

    def open_shards(self, plan: Plan, *, new: bool, sparse: bool = False) -> ShardFiles:
        """Open the files that tensors are written into."""

    def room(self, plan: Plan) -> int:
        """Return the bytes that a plan's weights take on the disk."""

    def check_space(self, nbytes: int) -> None:
        """Refuse a disk that cannot take so many bytes."""

    def open(self) -> None:
        """Create or enter the folder, and lock it."""

    def resumable(self, plan: Plan) -> bool:
        """Return True if an unfinished run's files are all there."""

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove what an unfinished run has left, but for the names to keep."""

    def path(self, name: str) -> Path:
        """Return where a file beside the weights is written."""

    def put(self, name: str, source: bytes | Path) -> None:
        """Write a small file, or copy one."""

    def sync(self) -> None:
        """Bring names and small files to the disk."""

    def publish(self, report: Mapping[str, Any], removed: Sequence[str] = ()) -> None:
        """Give everything its final name; `removed` are files in place that the result does not have."""

    def leave(self) -> None:
        """Leave everything as it is, for the same command to resume."""

    def discard(self) -> None:
        """Remove what is not worth resuming."""
