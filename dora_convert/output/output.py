"""Define the output of a run: the folder that is filled, and the rules to enter, resume and tidy it."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..adapters import Adapter
from ..errors import MalformedError, NumericalError, OutputError, RefError, VerificationError, hint_of
from ..plan.item import Item
from ..plan.plan import Plan
from ..settings import format_size
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import JOURNAL, RECORD, FileStates, is_weight_file, refuse_changed, same_lines
from ..storage.journal import JournalKey, UnfinishedRun, read_journal
from ..storage.reader import Reader
from ..storage.safetensors import encode_header
from .shards import ShardFiles
from .side_files import copy_or_write

if TYPE_CHECKING:
    from .early import HeadStart


class Output(ABC):
    """A folder that a run fills: an `OutputFolder` beside the base, or the base itself as `InPlace`."""

    WAY_OUT: str
    """The hint after an unfinished run of something else."""
    in_place = False
    """True if the run overwrites its own input, so that all errors must show before the first write."""
    overwrite = False
    """True if an unfinished run of something else may be removed."""
    given: str
    """OUT as the caller wrote it."""
    out: Path
    """OUT as an absolute path."""
    partial: Path
    """The folder that the weights are written into."""
    state: Path
    """The folder of journal and spool."""
    early: HeadStart | None = None
    """Shards that were begun before the run's key was known."""

    @abstractmethod
    def identity(self, bases: Sequence[Checkpoint]) -> Mapping[str, Any]:
        """Return JSON values that identify the bases among others with the same headers, without a read."""

    @abstractmethod
    def open(self) -> None:
        """Create the folder, or enter the one of an unfinished run, and lock it."""

    @abstractmethod
    def open_shards(self, plan: Plan, *, new: bool, sparse: bool = False) -> ShardFiles:
        """Open the files that tensors are written into."""

    @abstractmethod
    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove the files of an unfinished run, except the names in `keep`."""

    @abstractmethod
    def path(self, name: str) -> Path:
        """Return the path that a file beside the weights is written to."""

    @abstractmethod
    def sync(self) -> None:
        """Sync names and small files to the disk."""

    @abstractmethod
    def publish(self, report: Callable[[], Mapping[str, Any]], removed: Sequence[str] = ()) -> None:
        """Give everything its final name; `removed` are files of the base that the result does not have.

        Outputs that keep the report ask for it: of many tensors, it is long.
        """

    @abstractmethod
    def leave(self) -> None:
        """Unlock, and keep everything for the same command to resume."""

    @abstractmethod
    def discard(self) -> None:
        """Unlock, and remove a run that is not worth resuming."""

    def prepare(self, item: Item, reader: Reader) -> Item:  # noqa: ARG002 - for outputs in place
        """Return the item with a source that is safe to read while the item is written."""
        return item

    def settled(self, name: str) -> None:  # noqa: B027 - for outputs in place
        """Note that a tensor is written, synced and entered in the journal."""

    def bytes_needed(self, plan: Plan) -> int:
        """Return the bytes that a plan's weights take on the disk."""
        return plan.bytes_out

    def check_space(self, nbytes: int) -> None:
        """Refuse a disk without so many free bytes, less the bytes of an unfinished run."""
        parent = next(parent for parent in (self.out, *self.out.parents) if parent.exists())
        nbytes -= self._bytes_done()
        if (free := shutil.disk_usage(parent).free) < nbytes:
            raise OutputError(
                f"{parent} has {format_size(free)} free; the output needs {format_size(nbytes)}.",
                hint="free some space, or choose an OUT on another disk",
            )

    @property
    def begun(self) -> bool:
        """True if a run has begun to write and has not ended."""
        return (self.state / JOURNAL).exists()

    def _bytes_done(self) -> int:
        """Return the bytes that an unfinished run takes on the disk."""
        return 0

    def resumable(self, plan: Plan) -> bool:
        """Return True if all shards of a plan exist, at their full sizes."""
        for shard in plan.shards:
            path, nbytes = self.partial / shard.filename, sum(item.nbytes for item in shard.items)
            if (
                not path.is_file()
                or path.stat().st_size != len(encode_header(shard.items, shard.metadata, shard.prefix)) + nbytes
            ):
                return False
        return True

    def put(self, name: str, source: bytes | Path) -> None:
        """Write a small file, or copy one; the umask decides its permissions."""
        copy_or_write(self.path(name), source)

    @contextmanager
    def entered(self, *inputs: FileStates) -> Iterator[None]:
        """Open and lock the output; after an error keep it if the same command can resume the run.

        An error over `inputs` that have changed meanwhile is the error that they have changed.
        """
        self.open()
        try:
            with _unless_changed(*inputs):
                yield
        except BaseException as error:
            begun = self.begun
            left = self._abandon(keep=self._is_kept(error))
            if not isinstance(error, OSError):
                raise
            stays = f"{self.partial} stays; rerun the same command to resume" if begun else ""
            hints = [hint_of(error) or "", stays, left]
            raise OutputError(
                f"{self.out} cannot be written: {error.strerror or error}.",
                hint="; ".join(filter(None, hints)) or None,
                outcome="What is done is kept." if begun else None,
            ) from error

    def _is_kept(self, error: BaseException) -> bool:
        """Return True if the same command can resume a run that ended with an error."""
        if not self.begun:
            return False
        if isinstance(error, RefError):  # an input has changed: what is written is a mixture
            return self.in_place
        return not isinstance(error, NumericalError)

    def _abandon(self, *, keep: bool) -> str:
        """Leave or discard an output that failed; return the reason if even that fails."""
        try:
            self.leave() if keep else self.discard()
        except OSError as error:
            return f"{self.partial} could not be removed: {error.strerror or error}"
        return ""

    @contextmanager
    def tidied(self) -> Iterator[None]:
        """Say that the output is complete if the steps inside fail: they remove what nothing needs any more."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.out} is complete, but the cleanup after it failed: {error.strerror or error}.",
                hint=error.filename and f"{error.filename} is not needed any more",
                outcome="The output is complete.",
            ) from error

    def resume(
        self, key: JournalKey, keep: list[str], complete: Callable[[], bool], line_type: type
    ) -> UnfinishedRun | None:
        """Return the journal of an unfinished run with the same key, or None and an empty output.

        `keep` names the files that the run goes on with, `complete` says that all of them exist, and
        `line_type` is the type of the journal's lines.
        """
        if self.early:
            return None  # nothing but this run's shards is in the output
        path = self.state / JOURNAL
        unfinished = read_journal(path)
        if unfinished and _same_key(unfinished.key, key) and complete():
            self.clear(keep=[RECORD, *keep])
            return read_journal(path, line_type)
        if unfinished and not _same_key(unfinished.key, key) and not self.overwrite:
            raise OutputError(f"{self.partial} holds an unfinished run of something else.", hint=self.WAY_OUT)
        self.clear()
        return None


class Transfers(Protocol):
    """The downloads of a plan's inputs and the uploads of its output, while the plan runs."""

    local: bool
    """True if the output stays on this machine."""

    def reader(self) -> Reader:
        """Return a reader that waits for files that are downloaded."""

    def begin(self, folder: Path, shards: ShardFiles) -> None:
        """Take the output's folder and its open shards, and resume earlier uploads."""

    def shard_finished(self, shard: str) -> None:
        """Note that a shard is finished and, if checked, right; called by workers."""

    def settle(self) -> None:
        """Wait until all finished shards are uploaded."""


@contextmanager
def _unless_changed(*inputs: FileStates) -> Iterator[None]:
    """Turn an error over inputs into the error that they have changed, if they have."""
    try:
        yield
    except (MalformedError, RefError, VerificationError):
        refuse_changed(*inputs)
        raise


def _same_key(earlier: JournalKey, key: JournalKey) -> bool:
    """Return True if an earlier run's key is of the same run; a base's attributes may have changed."""
    return {**earlier, "base": None} == {**key, "base": None} and same_lines(earlier.get("base"), key["base"])


def input_states(output: Output, checkpoints: Iterable[Checkpoint], adapters: Iterable[Adapter]) -> list[FileStates]:
    """Return the files that a run reads, to be compared before it publishes; in place, its own weights change."""
    read = [each.states for each in checkpoints]
    if output.in_place:
        read = [{path: state for path, state in read[0].items() if not is_weight_file(path.name)}, *read[1:]]
    return [*read, *(adapter.states for adapter in adapters)]
