"""Change a checkpoint where it lies, without a second copy and without harm from a kill at any moment.

Beside the weights, in `.dora-convert-in-place/`, lie

    journal.jsonl   the key, then a line for each finished tensor; the last line says that files are staged
    old/<hash>      the old bytes of a tensor that is overwritten, synced before the first write
    new/<name>      the new files beside the weights, moved to their final names at the end

A tensor is computed from its old bytes alone, so the same command repairs a tensor that a kill left half
written. Every tensor is computed once before the first byte is changed, so an error leaves no trace. While
the journal exists, the folder is not a model, and only the same command accepts it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import xxhash
from filelock import FileLock, Timeout

from ..errors import Fault, OutputError, UnsupportedError
from ..plan.item import Item
from ..plan.plan import Plan
from ..settings import Settings
from ..storage.checkpoint import Checkpoint, Shard
from ..storage.filenames import IN_PLACE, JOURNAL, RECORD, is_inside, list_files
from ..storage.journal import Journal, read_journal, sync_path
from ..storage.json_files import checked
from ..storage.reader import Reader
from ..storage.refs import PathLike
from ..storage.safetensors import StoredTensor
from .folder import LOCK
from .output import Output
from .shards import ShardFiles

SPARE = 16
"""Old tensors that may wait for the new ones to be synced."""
LAST = (f"{RECORD}/receipt.json",)
"""The receipt is moved last: it says how to undo the merge of all other files."""


class StagedLine(msgspec.Struct, frozen=True):
    """The last line of a journal: all that is left to do is to move files to their final names."""

    staged: list[str]
    removed: list[str]
    report: dict[str, Any]

    def __post_init__(self) -> None:
        if not all(map(is_inside, [*self.staged, *self.removed])):
            raise ValueError("a path leads out of the folder")
        msgspec.convert((self.report.get("command"), self.report.get("adapters")), tuple[str, list[str]])


class InPlace(Output):
    """A checkpoint while it is changed."""

    WAY_OUT = "rerun the command that began it to resume"
    in_place = True

    def __init__(self, path: Path, shards: Sequence[Shard] = (), index_name: str | None = None) -> None:
        """Take a folder, and the shards of the checkpoint in it."""
        self._shards = {shard.filename: {tensor.name: tensor for tensor in shard.tensors} for shard in shards}
        self._tensors = {name: tensor for shard in self._shards.values() for name, tensor in shard.items()}
        self._index_name = index_name
        self.given = str(path)
        self.out = self.partial = path
        self.state = self.partial / IN_PLACE
        self._lock = FileLock(self.state / LOCK)

    def refuse(self, plan: Plan) -> None:
        """Raise UnsupportedError, with every reason, for other headers and for shared files."""
        if faults := [*self._other_headers(plan), *self._shared(plan)]:
            raise UnsupportedError(
                f"{self.given} cannot be changed in place.", faults=faults, hint="name an OUT instead of --in-place"
            )

    def _other_headers(self, plan: Plan) -> Iterator[Fault]:
        for name in sorted({shard.filename for shard in plan.shards} ^ self._shards.keys()):
            yield Fault(name, "would be another file")
        for shard in plan.shards:
            mine = self._shards.get(shard.filename, {})
            for item in shard.items:
                if why := _moved(item, mine.get(item.name)):
                    yield Fault(item.name, why)
            for name in sorted(mine.keys() - {item.name for item in shard.items}):
                yield Fault(name, "would be removed")
        if plan.config is not None or plan.index_name != self._index_name:
            yield Fault("config.json" if plan.config is not None else "the index", "would change")

    def _shared(self, plan: Plan) -> Iterator[Fault]:
        """Yield a fault for each changed file that is a link or has other names, as in a Hub cache."""
        if not self.partial.is_dir():
            yield Fault(self.given, "is not a folder")
            return
        for shard in plan.shards:
            path = self.partial / shard.filename
            if all(item.verbatim for item in shard.items) or not path.exists():
                continue
            if path.is_symlink() or path.stat().st_nlink > 1:
                yield Fault(shard.filename, "is a link, or has another name that would change with it")

    def identity(self, bases: Sequence[Checkpoint]) -> Mapping[str, Any]:  # noqa: ARG002 - as of OutputFolder
        """Return the folder's path: the folder's files change while the run lasts."""
        return {"base": [], "place": str(self.out.resolve())}

    def open_shards(self, plan: Plan, *, new: bool, sparse: bool = False) -> ShardFiles:  # noqa: ARG002
        """Open the folder's own files; tensors are written at their present offsets."""
        starts = {name: tensor.start for name, tensor in self._tensors.items()}
        return ShardFiles(self.partial, plan, create=False, starts=starts)

    def bytes_needed(self, plan: Plan) -> int:
        """Return the bytes that the copies of old tensors may take."""
        return SPARE * max((item.nbytes for item in plan.items if not item.verbatim), default=0)

    def open(self) -> None:
        """Create the state folder, or enter the one of an unfinished run, and lock it."""
        try:
            self.state.mkdir(exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(f"Another run is changing {self.given}.", hint="wait for it") from error
        except OSError as error:
            raise OutputError(f"{self.state} cannot be written: {error.strerror or error}.") from error

    def resumable(self, plan: Plan) -> bool:  # noqa: ARG002 - as of an OutputFolder
        """Return True: the files of a plan are the folder's own."""
        return True

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove the state of a run that had not begun to change weights."""
        if not keep:
            for entry in self.state.iterdir():
                if entry.name != LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            sync_path(self.partial)

    def prepare(self, item: Item, reader: Reader) -> Item:
        """Copy the tensor's old bytes to the disk, and return the item with the copy as source."""
        path, stored = self._old(item.name), self._tensors[item.name]
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                for piece in reader.pieces(stored):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
            sync_path(path.parent)
        old = replace(item.source, path=path, start=0)
        if item.source is item.base:
            return replace(item, source=old, base=old)
        if item.undo:
            mine = (item.source.path, item.source.start) == (stored.path, stored.start)
            return replace(item, source=old) if mine else item
        assert item.base
        return replace(item, base=replace(item.base, path=path, start=0))

    def settled(self, name: str) -> None:
        """Remove the copy of a tensor's old bytes: the new ones are synced and entered in the journal."""
        self._old(name).unlink(missing_ok=True)

    def _old(self, name: str) -> Path:
        """Return the path of a tensor's old bytes: a hash, since file systems fold case and limit lengths."""
        return self.state / "old" / f"{xxhash.xxh3_128_hexdigest(name.encode())}.old"

    def path(self, name: str) -> Path:
        """Return the path that a file beside the weights is staged at until all files are."""
        path = self.state / "new" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def put(self, name: str, source: bytes | Path) -> None:
        """Stage a file, unless it is the folder's own."""
        if source != self.partial / name:
            super().put(name, source)

    def sync(self) -> None:
        """Sync names and small files to the disk."""
        for path in (self.partial, self.state, *self.state.rglob("*")):
            sync_path(path)

    def publish(self, report: Callable[[], Mapping[str, Any]], removed: Sequence[str] = ()) -> None:
        """Move the staged files to their final names and remove stale ones; `finish` repairs a kill."""
        self.path(LOCK).unlink(missing_ok=True)
        self.sync()
        earlier = read_journal(self.state / JOURNAL)
        assert earlier
        staged = list_files(self.state / "new")
        journal = Journal(self.state / JOURNAL, earlier.key, earlier)
        journal.add(StagedLine(staged, list(removed), dict(report())), [])
        journal.close()
        self.finish()

    def finish(self) -> dict[str, Any] | None:
        """Finish a run whose files are all staged, and return its report; None for any other run."""
        earlier = read_journal(self.state / JOURNAL)
        last: dict[str, Any] = earlier.lines[-1] if earlier and earlier.lines else {}
        if "staged" not in last:
            return None
        line = checked(last, StagedLine, f"{self.state / JOURNAL} is damaged: its last line")
        for name in sorted(line.staged, key=lambda name: name in LAST):
            if (waiting := self.state / "new" / name).exists():
                (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
                waiting.replace(self.partial / name)
        sync_path(self.partial)
        for name in sorted(line.removed, key=lambda name: name in LAST):
            (self.partial / name).unlink(missing_ok=True)
        folder = self.partial / RECORD
        _remove_empty(folder)
        for path in (folder, *folder.rglob("*")) if folder.is_dir() else ():
            sync_path(path)
        sync_path(self.partial)
        (self.state / JOURNAL).unlink()
        with self.tidied():
            self.discard()
        return line.report

    def leave(self) -> None:
        """Unlock, and keep the state if weights were changed, for the same command to resume."""
        self.discard()

    def discard(self) -> None:
        """Unlock, and remove the state unless a journal says that weights were changed."""
        self._lock.release()
        if not self.begun and self.state.is_dir():
            shutil.rmtree(self.state)
            sync_path(self.partial)


def _moved(item: Item, stored: StoredTensor | None) -> str:
    """Return the reason why a tensor cannot be written over a stored one; empty if it can."""
    if not stored:
        return "is not in this file yet"
    if (stored.dtype, stored.shape) != (item.dtype, item.shape):
        return f"would become {item.dtype} {list(item.shape)}"
    moved = item.verbatim and (item.source.path, item.source.start) != (stored.path, stored.start)
    return "would be replaced as bytes" if moved else ""


def _remove_empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True) if folder.is_dir() else ():
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def finished(folder: PathLike, verb: str, adapters: Sequence[str], settings: Settings) -> dict[str, Any] | None:
    """Finish a run whose files are all staged, and return its report if the same command began it."""
    output = InPlace(Path(folder))
    if not output.state.is_dir():
        return None
    with output.entered():
        report = output.finish()
        output.leave()
    if report is None:
        return None
    settings.notify(f"{report['command']} --in-place of an earlier run is finished")
    names = [[Path(name).name for name in given] for given in (report["adapters"], adapters)]
    return report if report["command"] == verb and names[0] == names[1] else None
