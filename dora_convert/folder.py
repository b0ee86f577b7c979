"""The output folder: built beside its final name, published by one rename.

Until `publish`, everything is in `OUT.partial`, and a lock there keeps a second run out. A folder that has its final
name is complete; an OUT that is to be overwritten is moved aside first and deleted last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from .checkpoint import RECORD
from .errors import OutputError
from .journal import NAME as JOURNAL
from .sizes import format_size
from .undo import SPOOL

LOCK = ".lock"
MARKER = ".dora-convert-replaced"


class OutputFolder:
    """OUT while it is being made."""

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.given = str(out)
        out = Path(os.path.abspath(out))  # noqa: PTH100 - a link stays a link
        if not out.name:
            raise OutputError(f"OUT {out} is no name for a folder.")
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self.record = self.partial / RECORD
        self.old = out.with_name(out.name + ".old")
        self.overwrite = overwrite
        self._lock = FileLock(self.partial / LOCK)

    def check(self) -> None:
        """Refuse what publishing would refuse, before any work: OUT exists, or is no folder that may be replaced."""
        self._repair()
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
        if not (self.old / MARKER).exists():
            return
        if self.out.exists():
            shutil.rmtree(self.old)
        else:
            (self.old / MARKER).unlink()
            self.old.rename(self.out)

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
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                f"Another run is writing {self.out}.", hint="wait for it, or choose another OUT"
            ) from error
        except OSError as error:
            raise OutputError(f"{self.partial} cannot be written: {error.strerror or error}.") from error

    def _refuse_foreign(self) -> None:
        if self.partial.exists():
            names = {entry.name for entry in self.partial.iterdir()}
            if names and not names & {LOCK, RECORD}:
                raise OutputError(
                    f"{self.partial} exists and is not an unfinished output.", hint="move it away"
                )

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove what an unfinished run has left, but for the names to keep."""
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
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            path.write_bytes(source)
        else:
            shutil.copyfile(source, path)

    def sync(self) -> None:
        """Bring names and small files to the disk."""
        for path in (self.partial, *self.partial.rglob("*")):
            _sync(path)

    def publish(self) -> None:
        """Make OUT.partial OUT. Everything in it is synced before, its name after."""
        self.sync()
        replaced = os.path.lexists(self.out)
        if replaced:
            self.check()  # it may have come into being since
            (self.out / MARKER).touch()
            self.out.rename(self.old)
        (self.record / JOURNAL).unlink()
        (self.record / SPOOL).unlink()
        self._unlock()
        self.partial.rename(self.out)
        _sync(self.out.parent)
        if replaced:
            shutil.rmtree(self.old)

    def leave(self) -> None:
        """Leave OUT.partial as it is, for the same command to continue."""
        self._lock.release()

    def discard(self) -> None:
        """Remove OUT.partial: nothing in it is worth continuing."""
        self._unlock()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _unlock(self) -> None:
        self._lock.release()
        (self.partial / LOCK).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """fsync a file or a folder; Windows cannot open folders."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
