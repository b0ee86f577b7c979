"""A checkpoint that is changed where it is: no second copy, and no moment at which a kill would harm it.

Beside the weights, in `.dora-convert-in-place/`, lie

    journal.jsonl   the key, and one line for each tensor that is finished; the last one says that all files are staged
    old/<name>      the bytes of a tensor that is being overwritten, synced before the first of them is
    new/<name>      the files beside the weights as they will be, put in their places at the end

A tensor is made from its old bytes and nothing else, so whatever a kill has left of it, the same command makes it again.
Every tensor is computed once before the first byte is changed: what cannot be merged leaves no trace. While the journal
is there, the folder is not a model, and nothing but the same command takes it for one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from filelock import FileLock, Timeout

from ..errors import Fault, OutputError, UnsupportedError
from ..plan.item import Item
from ..plan.plan import Plan
from ..settings import Settings
from ..sizes import format_size
from ..storage.checkpoint import Checkpoint, Shard
from ..storage.filenames import IN_PLACE, JOURNAL, RECORD, is_inside, list_files
from ..storage.journal import Journal, read_journal, sync_path
from ..storage.json_files import checked
from ..storage.reader import Reader
from ..storage.refs import PathLike
from ..storage.safetensors import StoredTensor
from .folder import LOCK, copy_or_write
from .shards import ShardFiles

SPARE = 16
"""Old tensors that may wait for their successors to be synced."""
LAST = (f"{RECORD}/receipt.json",)
"""What tells how to undo a merge goes last, when all else is in its place."""


class StagedLine(msgspec.Struct, frozen=True):
    """The last line of a journal: all that is left to do is to move files to their final names."""

    staged: list[str]
    removed: list[str]
    report: dict[str, Any]

    def __post_init__(self) -> None:
        if not all(map(is_inside, [*self.staged, *self.removed])):
            raise ValueError("a path leads out of the folder")
        msgspec.convert((self.report.get("command"), self.report.get("adapters")), tuple[str, list[str]])


class InPlace:
    """A folder while it is changed; used like an `OutputFolder`."""

    WAY_OUT = "run the same command as before; it continues"
    in_place = True
    overwrite = False

    def __init__(self, path: Path, shards: Sequence[Shard] = (), index_name: str | None = None) -> None:
        self._shards = {shard.filename: {tensor.name: tensor for tensor in shard.tensors} for shard in shards}
        self._tensors = {name: tensor for shard in self._shards.values() for name, tensor in shard.items()}
        self._index_name = index_name
        self.given = str(path)
        self.out = self.partial = path
        self.record = self.partial / IN_PLACE
        self._lock = FileLock(self.record / LOCK)

    @property
    def begun(self) -> bool:
        """Whether a run has begun to change weights, and not ended."""
        return (self.record / JOURNAL).exists()

    def refuse(self, plan: Plan) -> None:
        """Refuse what cannot be done in place: other headers, and files that are not this folder's alone.

        Raises UnsupportedError with every reason.
        """
        faults = [*self._other_headers(plan), *self._shared(plan)]
        if faults:
            raise UnsupportedError(
                f"{self.given} cannot be changed in place.",
                faults=faults,
                hint="name an OUT instead of --in-place",
            )

    def _other_headers(self, plan: Plan) -> Iterator[Fault]:
        for name in sorted({shard.filename for shard in plan.shards} ^ self._shards.keys()):
            yield Fault(name, "would be another file")
        for shard in plan.shards:
            mine = self._shards.get(shard.filename, {})
            for item in shard.items:
                if why := _misplaced(item, mine.get(item.name)):
                    yield Fault(item.name, why)
            for name in sorted(mine.keys() - {item.name for item in shard.items}):
                yield Fault(name, "would be removed")
        if plan.config is not None or plan.index_name != self._index_name:
            yield Fault("config.json" if plan.config is not None else "the index", "would change")

    def _shared(self, plan: Plan) -> Iterator[Fault]:
        """Files that are links, or have other names: a Hub cache is made of them."""
        if not self.partial.is_dir():
            yield Fault(self.given, "is no folder")
            return
        for shard in plan.shards:
            if (
                all(item.verbatim for item in shard.items)
                or not (path := self.partial / shard.filename).exists()
            ):
                continue
            if path.is_symlink() or path.stat().st_nlink > 1:
                yield Fault(shard.filename, "is a link, or has another name that would change with it")

    def identity(self, bases: Sequence[Checkpoint]) -> Mapping[str, Any]:  # noqa: ARG002 - as of OutputFolder
        """Return the folder's path: its files change while the run lasts."""
        return {"base": [], "place": str(self.out.resolve())}

    def open_shards(self, plan: Plan, *, new: bool, sparse: bool = False) -> ShardFiles:  # noqa: ARG002
        """Open the folder's own files; tensors are written where they begin now."""
        starts = {name: tensor.start for name, tensor in self._tensors.items()}
        return ShardFiles(self.partial, plan, create=False, places=starts)

    def room(self, plan: Plan) -> int:
        """Bytes that old tensors may take until they are not needed any more."""
        return SPARE * max((item.nbytes for item in plan.items if not item.verbatim), default=0)

    def check_space(self, nbytes: int) -> None:
        """Refuse when the disk cannot take so many bytes."""
        if (free := shutil.disk_usage(self.partial).free) < nbytes:
            raise OutputError(
                f"{self.partial} has {format_size(free)} free; {format_size(nbytes)} are needed."
            )

    def open(self) -> None:
        """Create the folder inside, or enter the one of an unfinished run, and lock it."""
        try:
            self.record.mkdir(exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(f"Another run is changing {self.given}.", hint="wait for it") from error
        except OSError as error:
            raise OutputError(f"{self.record} cannot be written: {error.strerror or error}.") from error

    def resumable(self, plan: Plan) -> bool:  # noqa: ARG002 - as of an OutputFolder
        """Whether the files of a plan are there: they always are."""
        return True

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove what a run has left that had not begun to change anything."""
        if not keep:
            for entry in self.record.iterdir():
                if entry.name != LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            sync_path(self.partial)

    def prepare(self, item: Item, reader: Reader) -> Item:
        """The item, to be made from a copy of the tensor's old bytes, which is on the disk when this returns."""
        path = self._old(item)
        stored = self._tensors[item.name]
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

    def settled(self, item: Item) -> None:
        """The tensor is finished, synced and entered: its old bytes are not needed any more."""
        self._old(item).unlink(missing_ok=True)

    def _old(self, item: Item) -> Path:
        return self.record / "old" / (quote(item.name, safe="")[-200:] + ".old")

    def path(self, name: str) -> Path:
        """Where a file beside the weights waits until all are there."""
        path = self.record / "new" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def put(self, name: str, source: bytes | Path) -> None:
        """Stage a file, unless it is there already."""
        if source != self.partial / name:
            copy_or_write(self.path(name), source)

    def sync(self) -> None:
        """Bring names and small files to the disk."""
        for path in (self.partial, self.record, *self.record.rglob("*")):
            sync_path(path)

    def publish(self, report: Mapping[str, Any], removed: Sequence[str] = ()) -> None:
        """Put the staged files in their places and remove others; a kill in between is made good by `finish`."""
        self.path(LOCK).unlink(missing_ok=True)
        self.sync()
        earlier = read_journal(self.record / JOURNAL)
        assert earlier
        staged = list_files(self.record / "new")
        journal = Journal(self.record / JOURNAL, earlier.key, earlier)
        journal.add(StagedLine(staged, list(removed), dict(report)), [])
        journal.close()
        self.finish()

    def finish(self) -> dict[str, Any] | None:
        """What an unfinished run still had to do when all its files were staged; its report, or None if it was not so far."""
        earlier = read_journal(self.record / JOURNAL)
        last: dict[str, Any] = earlier.lines[-1] if earlier and earlier.lines else {}
        if "staged" not in last:
            return None
        line = checked(last, StagedLine, f"{self.record / JOURNAL} is damaged: its last line")
        for name in sorted(line.staged, key=lambda name: name in LAST):
            if (waiting := self.record / "new" / name).exists():
                (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
                waiting.replace(self.partial / name)
        sync_path(self.partial)
        for name in sorted(line.removed, key=lambda name: name in LAST):
            (self.partial / name).unlink(missing_ok=True)
        _remove_empty(self.partial / RECORD)
        self._sync_record()
        (self.record / JOURNAL).unlink()
        self.discard()
        return line.report

    def _sync_record(self) -> None:
        folder = self.partial / RECORD
        for path in (folder, *folder.rglob("*")) if folder.is_dir() else ():
            sync_path(path)
        sync_path(self.partial)

    def leave(self) -> None:
        """Leave everything as it is, for the same command to continue; nothing where nothing was changed yet."""
        self.discard()

    def discard(self) -> None:
        """Remove the folder inside, unless a journal says that weights were changed."""
        self._lock.release()
        if not self.begun:
            shutil.rmtree(self.record, ignore_errors=True)
            sync_path(self.partial)


def _misplaced(item: Item, stored: StoredTensor | None) -> str:
    """Why a tensor cannot be made where one is now."""
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


def finished(
    folder: PathLike, verb: str, adapters: Sequence[str], settings: Settings
) -> dict[str, Any] | None:
    """Bring a run to its end that had staged all its files; its report where it was the same command's."""
    place = InPlace(Path(folder))
    if not place.record.is_dir():
        return None
    place.open()
    report = place.finish()
    place.leave()
    if report is None:
        return None
    settings.notify(f"{report['command']} --in-place of an earlier run is finished")
    same = report["command"] == verb and [Path(name).name for name in report["adapters"]] == [
        Path(name).name for name in adapters
    ]
    return report if same else None
