"""Build the output folder beside its final name, and publish it by one rename.

Until `publish`, everything is in `OUT.partial`, and a lock there keeps a second run out. A folder with its
final name is complete. An OUT that is to be overwritten is moved aside first and deleted last.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ..errors import OutputError, UsageError
from ..plan.plan import Plan
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import CLAIM, JOURNAL, RECORD, SPOOL, UPLOADS, is_text, journal_lines
from ..storage.journal import sync_path
from ..storage.refs import PathLike, local_path, refuse_address
from .output import Output
from .shards import ShardFiles

if TYPE_CHECKING:
    from .existing import Kind

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
MARKER = ".dora-convert-replaced"
LONGEST_NAME = 255 - len(".partial")
"""Bytes in the name of an OUT: file systems take 255, and a run's folder has a longer name than its OUT."""


class OutputFolder(Output):
    """A new folder for the output."""

    WAY_OUT = "--overwrite starts over; the unfinished run is lost"

    def __init__(self, out: PathLike, *, overwrite: bool, kind: Kind = "a model") -> None:
        """Refuse an OUT whose name no folder can have."""
        self.kind = kind
        refuse_address(out)
        named = local_path(os.fspath(out), "OUT")
        self.given = str(named)
        out = Path(os.path.abspath(named))  # noqa: PTH100 - a link stays a link
        if not out.name or "\0" in self.given or not is_text(str(out)):
            raise OutputError(f"OUT {self.given!r} is not a valid folder name.", hint="a name in UTF-8, such as merged")
        if len(os.fsencode(out.name)) > LONGEST_NAME:
            raise OutputError(f"OUT {self.given!r} is too long a name.", hint=f"at most {LONGEST_NAME} bytes")
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self.state = self.partial / RECORD
        self.old = out.with_name(out.name + ".old")
        self.overwrite = overwrite
        self._lock = FileLock(self.partial / LOCK)
        self._held: int | None = None

    def check(self) -> None:
        """Refuse, before any work, an OUT that exists or that `--overwrite` may not replace."""
        self._repair()
        parent = next(parent for parent in self.out.parents if os.path.lexists(parent))
        if not parent.is_dir():
            raise OutputError(f"OUT {self.out} cannot be created: {parent} is not a folder.")
        if not os.path.lexists(self.out):
            return
        from .existing import refuse_existing

        refuse_existing(self.out, self.kind, overwrite=self.overwrite)
        if self.old.exists():
            raise OutputError(f"{self.old} exists; a replaced OUT is moved there.", hint="move it away")

    def _repair(self) -> None:
        """Finish an earlier run that was killed while it published OUT."""
        if (self.old / MARKER).exists():
            if self.out.exists():
                _remove_marked(self.old)
            else:
                self.old.rename(self.out)
        elif self.old.is_dir() and not any(self.old.iterdir()):
            self.old.rmdir()
        if (self.out / MARKER).exists():
            (self.out / MARKER).unlink()
        _remove_empty_record(self.out)

    def refuse_inside(self, inputs: Iterable[Path]) -> None:
        """Refuse to write into, over or around an input's folder."""
        out = self.out.resolve()
        for path in inputs:
            folder = path.resolve()
            if out == folder or folder in out.parents or out in folder.parents:
                raise OutputError(f"OUT {self.out} overlaps the input {path}.", hint="choose another folder")

    def _bytes_done(self) -> int:
        """Return the bytes that OUT.partial takes: fewer than its files' sizes if they have holes."""
        stats = [path.stat() for path in self.partial.rglob("*") if path.is_file()]
        return sum(int(getattr(stat, "st_blocks", -(-stat.st_size // 512))) * 512 for stat in stats)

    @property
    def is_open(self) -> bool:
        """True while this process holds the lock."""
        return self._lock.is_locked

    def open(self) -> None:
        """Create OUT.partial, or enter the one of an unfinished run, and lock it."""
        if self.is_open:
            return  # begun early
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
            raise OutputError(f"{self.partial} cannot be written: {where}{error.strerror or error}.") from error
        try:
            self.check()  # another run may have published OUT since this one began
        except OutputError:
            self._abandon(keep=self.begun)
            raise

    def _refuse_foreign(self) -> None:
        names = {entry.name for entry in self.partial.iterdir()} if self.partial.is_dir() else set()
        odd = self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir())
        if odd or (names and not names & {LOCK, RECORD}):
            raise OutputError(f"{self.partial} exists and is not an unfinished output.", hint="move it away")

    def _hold(self) -> None:
        """Lock the folder itself, besides the file in it; this lock lasts until the final rename."""
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

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove the files of an unfinished run, except the names in `keep`.

        The journal goes first, and is synced away: it must not be found beside files of a later run.
        """
        if RECORD not in keep and self.state.is_dir():
            (self.state / JOURNAL).unlink(missing_ok=True)
            sync_path(self.state)
        for entry in self.partial.iterdir():
            if entry.name not in (LOCK, *keep):
                _remove(entry)
        self.state.mkdir(exist_ok=True)

    def path(self, name: str) -> Path:
        """Return the path that a file beside the weights is written to."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def sync(self) -> None:
        """Sync names and small files to the disk."""
        for path in (self.partial.parent, self.partial, *self.partial.rglob("*")):
            sync_path(path)

    def identity(self, bases: Sequence[Checkpoint]) -> Mapping[str, Any]:
        """Return JSON values that identify the bases among others with the same headers, without a read."""
        return {"base": [line for base in bases for line in _identity(base)]}

    def open_shards(self, plan: Plan, *, new: bool, sparse: bool = False) -> ShardFiles:
        """Create the shards in OUT.partial, or open the shards of an unfinished run."""
        if self.early and self.early.shards.fits(plan):
            return self.early.shards
        if self.early:
            self._stop_early()
            self.clear()
        return ShardFiles(self.partial, plan, create=new, sparse=sparse, cached=sparse)

    def publish(self, report: object = None, removed: Sequence[str] = ()) -> None:  # noqa: ARG002
        """Rename OUT.partial to OUT; all files are synced before the rename, the name after it."""
        self.sync()
        replaced = os.path.lexists(self.out)
        if replaced:
            self.check()  # OUT may be newer than this run
            (self.out / MARKER).touch()
            sync_path(self.out)
        self._strip()
        try:
            if replaced:
                self.out.rename(self.old)
            self.partial.rename(self.out)
        except OSError:
            with suppress(OSError):
                self._repair()
            raise
        with self.tidied():
            _remove_empty_record(self.out)
            sync_path(self.out.parent)
            self.leave()
            if replaced:
                _remove_marked(self.old)

    def _strip(self) -> None:
        """Remove the files that OUT does not have; the journal first, since it names the others."""
        (self.state / JOURNAL).unlink()
        sync_path(self.state)
        (self.state / SPOOL).unlink()
        for name in (UPLOADS, CLAIM):
            (self.state / name).unlink(missing_ok=True)
        self._unlock()
        sync_path(self.state)
        sync_path(self.partial)

    def _stop_early(self) -> None:
        if self.early:
            self.early.discard()
            self.early = None

    def leave(self) -> None:
        """Unlock, and keep OUT.partial for the same command to resume."""
        self._stop_early()
        self._lock.release()
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def discard(self) -> None:
        """Unlock, and remove OUT.partial, which is not worth resuming."""
        self._stop_early()
        try:
            self._unlock()
            if self.partial.exists():
                shutil.rmtree(self.partial)
        finally:
            self.leave()

    def _unlock(self) -> None:
        self._lock.release()
        (self.partial / LOCK).unlink(missing_ok=True)


def new_folder(out: PathLike | None, verb: str, *, overwrite: bool) -> OutputFolder:
    """Return OUT as a folder; refuse an OUT that is missing or taken."""
    if out is None:
        raise UsageError(f"{verb} needs OUT, or --in-place.")
    folder = OutputFolder(out, overwrite=overwrite)
    folder.check()
    return folder


def _make_folder(path: Path) -> None:
    """Create a folder and its parents, and sync their names."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_path(path.parent)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _remove_empty_record(out: Path) -> None:
    """Remove the folder of the record if nothing is in it: an adapter has none, nor has a base that no merge wrote."""
    if (out / RECORD).is_dir() and not any((out / RECORD).iterdir()):
        (out / RECORD).rmdir()
        sync_path(out)


def _remove_marked(folder: Path) -> None:
    """Remove a folder with a marker in it; the marker last, so that a killed removal can be finished."""
    for entry in folder.iterdir():
        if entry.name != MARKER:
            _remove(entry)
    (folder / MARKER).unlink()
    folder.rmdir()


def _identity(base: Checkpoint) -> list[list[Any]]:
    """Return a base's commit, or else the path and the state of each shard."""
    if base.source.commit:
        return [[base.source.repo or str(base.source.url), base.source.commit]]
    weights = {base.root / shard.filename for shard in base.shards}
    return journal_lines({path: state for path, state in base.states.items() if path in weights})
