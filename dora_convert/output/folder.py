"""The output folder: built beside its final name, published by one rename.

Until `publish`, everything is in `OUT.partial`, and a lock there keeps a second run out. A folder that has its final
name is complete; an OUT that is to be overwritten is moved aside first and deleted last.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import MalformedError, OutputError, UsageError
from ..plan.item import Item
from ..plan.plan import Plan
from ..sizes import format_size
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import JOURNAL, RECORD, SPOOL, UPLOADS, is_text
from ..storage.journal import sync_path
from ..storage.reader import Reader
from ..storage.refs import PathLike
from .shards import ShardFiles, shards_exist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
MARKER = ".dora-convert-replaced"


class OutputFolder:
    """OUT while it is being made."""

    WAY_OUT = "--overwrite starts over; what is there is lost"
    in_place = False

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.given = str(out)
        out = Path(os.path.abspath(out))  # noqa: PTH100 - a link stays a link
        if not out.name or "\0" in self.given:
            raise OutputError(f"OUT {self.given!r} is no name for a folder.")
        if not is_text(str(out)):
            raise OutputError(f"OUT {self.given!r} is no name in UTF-8; safetensors opens no others.")
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self.record = self.partial / RECORD
        self.old = out.with_name(out.name + ".old")
        self.overwrite = overwrite
        self._lock = FileLock(self.partial / LOCK)
        self._held: int | None = None

    def check(self) -> None:
        """Refuse what publishing would refuse, before any work: OUT exists, or is no folder that may be replaced."""
        self._repair()
        place = next(parent for parent in self.out.parents if os.path.lexists(parent))
        if not place.is_dir():
            raise OutputError(f"OUT {self.out} cannot be made: {place} is no folder.")
        if not os.path.lexists(self.out):
            return
        if not self.overwrite:
            raise OutputError(f"OUT {self.out} exists.", hint="choose another name, or --overwrite")
        if not self.out.is_dir() or self.out.is_symlink():
            raise OutputError(f"OUT {self.out} is not a folder; it is not replaced.")
        if not _is_model(self.out):
            raise OutputError(
                f"OUT {self.out} does not look like a model; it is not replaced.", hint="remove it yourself"
            )
        if self.old.exists():
            raise OutputError(
                f"{self.old} exists; OUT is moved there while it is replaced.", hint="move it away"
            )

    def _repair(self) -> None:
        """Finish what an earlier run was killed in the middle of: OUT had been moved aside to be replaced."""
        if (self.old / MARKER).exists():
            if self.out.exists():
                _remove_marked(self.old)
            else:
                self.old.rename(self.out)
        if (self.out / MARKER).exists():
            (self.out / MARKER).unlink()

    def refuse_inside(self, inputs: Iterable[Path]) -> None:
        """Refuse to write into, over or around an input's folder."""
        out = self.out.resolve()
        for path in inputs:
            folder = path.resolve()
            if out == folder or folder in out.parents or out in folder.parents:
                raise OutputError(
                    f"OUT {self.out} overlaps the input {path}.", hint="choose a folder beside it"
                )

    def check_space(self, nbytes: int) -> None:
        """Refuse when the disk cannot take so many bytes, beyond those an unfinished run has taken already."""
        place = next(parent for parent in self.partial.parents if parent.exists())
        taken = sum(_taken(path) for path in self.partial.rglob("*") if path.is_file())
        if (free := shutil.disk_usage(place).free) < nbytes - taken:
            raise OutputError(
                f"{place} has {format_size(free)} free; the output needs {format_size(nbytes - taken)}.",
                hint="free some space, or choose an OUT on another disk",
            )

    def open(self) -> None:
        """Create OUT.partial, or enter the one of an unfinished run, and lock it."""
        try:
            self._refuse_foreign()
            _make_folder(self.partial)
            self._hold()
            self._lock.acquire(timeout=0)
        except (Timeout, BlockingIOError) as error:
            self.leave()
            raise OutputError(
                f"Another run is writing {self.out}.", hint="wait for it, or choose another OUT"
            ) from error
        except OSError as error:
            self.leave()
            where = f"{error.filename}: " if error.filename not in (None, str(self.partial)) else ""
            raise OutputError(
                f"{self.partial} cannot be written: {where}{error.strerror or error}."
            ) from error
        self._check_again()

    def _refuse_foreign(self) -> None:
        names = {entry.name for entry in self.partial.iterdir()} if self.partial.is_dir() else set()
        odd = self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir())
        if odd or (names and not names & {LOCK, RECORD}):
            raise OutputError(f"{self.partial} exists and is not an unfinished output.", hint="move it away")

    def _hold(self) -> None:
        """Lock the folder itself, besides the file in it: that lock lasts until the folder has its final name."""
        if fcntl is None:
            return
        self._held = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without such locks
            return
        if not self.partial.exists() or not os.path.samestat(os.fstat(self._held), self.partial.stat()):
            raise BlockingIOError(errno.EWOULDBLOCK, "published at this moment")

    def _check_again(self) -> None:
        """Another run may have published OUT since this one began."""
        try:
            self.check()
        except OutputError:
            self.leave() if (self.record / JOURNAL).exists() else self.discard()
            raise

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove what an unfinished run has left, but for the names to keep.

        The journal goes first and for good: it must not be found beside files made later.
        """
        if RECORD not in keep and self.record.is_dir():
            (self.record / JOURNAL).unlink(missing_ok=True)
            sync_path(self.record)
        for entry in self.partial.iterdir():
            if entry.name in (LOCK, *keep):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        self.record.mkdir(exist_ok=True)

    def put(self, name: str, source: bytes | Path) -> None:
        """Write a small file, or copy one; its permissions are the umask's."""
        copy_or_write(self.path(name), source)

    def path(self, name: str) -> Path:
        """Where a file beside the weights is written."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def resumable(self, plan: Plan) -> bool:
        """Whether the shards of a plan are there, at their full sizes."""
        return shards_exist(self.partial, plan)

    def sync(self) -> None:
        """Bring names and small files to the disk."""
        for path in (self.partial.parent, self.partial, *self.partial.rglob("*")):
            sync_path(path)

    def identity(self, bases: Sequence[Checkpoint]) -> Mapping[str, Any]:
        """Return what tells the bases from others with the same headers, without reading them."""
        return {"base": [line for base in bases for line in _identity(base)]}

    def prepare(self, item: Item, reader: Reader) -> Item:  # noqa: ARG002 - as of InPlace
        """Return the item as it is: nothing that it reads is overwritten."""
        return item

    def settled(self, item: Item) -> None:
        """Do nothing: no old bytes are kept."""

    def open_shards(self, plan: Plan, *, new: bool, sparse: bool = False) -> ShardFiles:
        """Create the shards in OUT.partial, or open those that an unfinished run has left."""
        return ShardFiles(self.partial, plan, create=new, sparse=sparse)

    def room(self, plan: Plan) -> int:
        """Bytes that the weights of a plan take."""
        return plan.bytes_out

    def publish(self, report: object = None, removed: Sequence[str] = ()) -> None:  # noqa: ARG002
        """Make OUT.partial OUT. Everything in it is synced before, its name after."""
        self.sync()
        replaced = os.path.lexists(self.out)
        if replaced:
            self.check()  # it may have come into being since
            (self.out / MARKER).touch()
            sync_path(self.out)
        self._strip()
        if replaced:
            self.out.rename(self.old)
        self.partial.rename(self.out)
        sync_path(self.out.parent)
        self.leave()
        if replaced:
            _remove_marked(self.old)

    def _strip(self) -> None:
        """Remove what is not part of OUT; the journal first, since it speaks of the others."""
        (self.record / JOURNAL).unlink()
        sync_path(self.record)
        (self.record / SPOOL).unlink()
        (self.record / UPLOADS).unlink(missing_ok=True)
        self._unlock()
        sync_path(self.record)
        if not any(self.record.iterdir()):  # an adapter has none, nor has a base that no merge had made
            self.record.rmdir()
        sync_path(self.partial)

    def leave(self) -> None:
        """Leave OUT.partial as it is, for the same command to continue."""
        self._lock.release()
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def discard(self) -> None:
        """Remove OUT.partial: nothing in it is worth continuing."""
        self._unlock()
        shutil.rmtree(self.partial, ignore_errors=True)
        self.leave()

    def _unlock(self) -> None:
        self._lock.release()
        (self.partial / LOCK).unlink(missing_ok=True)


def new_folder(out: PathLike | None, verb: str, *, overwrite: bool) -> OutputFolder:
    """OUT, which must be given and free."""
    if out is None:
        raise UsageError(f"{verb} needs OUT, or --in-place.")
    folder = OutputFolder(Path(out), overwrite=overwrite)
    folder.check()
    return folder


def copy_or_write(path: Path, source: bytes | Path) -> None:
    """Write a small file, or copy one; its permissions are the umask's."""
    if isinstance(source, bytes):
        path.write_bytes(source)
        return
    try:
        source.open("rb").close()
    except OSError as error:  # the input's fault, not OUT's
        raise MalformedError(f"{source} cannot be read: {error.strerror or error}.") from error
    shutil.copyfile(source, path)


def _make_folder(path: Path) -> None:
    """Create a folder and those above it, and bring their names to the disk."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_path(path.parent)


def _remove_marked(folder: Path) -> None:
    """Remove a folder with a marker in it; the marker last, so that the rest is known for what it is."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()
    (folder / MARKER).unlink()
    folder.rmdir()


def _taken(path: Path) -> int:
    """Bytes a file takes on the disk, which are fewer than its size where it has holes."""
    stat = path.stat()
    return int(getattr(stat, "st_blocks", -(-stat.st_size // 512))) * 512


def _is_model(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return (
        not names
        or bool(names & {"config.json", RECORD})
        or any(name.endswith(".safetensors") for name in names)
    )


def _identity(base: Checkpoint) -> list[list[Any]]:
    """What tells a base from another with the same headers, without reading it."""
    if base.source.commit:
        return [[str(base.source.repo), base.source.commit]]
    found: list[list[Any]] = []
    for shard in base.shards:
        path = (base.root / shard.filename).resolve()
        stat = path.stat()
        found.append([str(path), stat.st_size, stat.st_mtime_ns])
    return found
