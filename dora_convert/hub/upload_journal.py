"""Keep a journal of the files that an unfinished upload has brought to the Hub: name, size and sha256."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec

from ..storage.journal import JournalKey, UnfinishedRun, read_journal
from ..storage.json_files import Count

REFUSED = "not to be copied"
"""Stands for the sha256 of a file that must be uploaded: the Hub refused a commit with a copy of the file."""


class UploadedFile(msgspec.Struct, frozen=True):
    """A line of the journal: an uploaded file, as it was on this machine."""

    name: str
    bytes: Count
    mtime: int
    sha256: str


def _read(path: Path, key: JournalKey | None) -> UnfinishedRun | None:
    earlier = read_journal(path, UploadedFile)
    return earlier if earlier and earlier.key == key else None


def refused_copies(path: Path, key: JournalKey) -> frozenset[str] | None:
    """Return the files that a journal says must not be copied; None without a journal of this key."""
    if not (earlier := _read(path, key)):
        return None
    latest = {file.name: file.sha256 for file in earlier.lines}
    return frozenset(name for name, sha256 in latest.items() if sha256 == REFUSED)


class UploadJournal:
    """A journal of uploaded files; without a path nothing is kept."""

    def __init__(self, path: Path | None = None, key: JournalKey | None = None, *, by_name: bool = False) -> None:
        """Resume the journal at `path` if it has the same key, else start a new one.

        `by_name`: a file counts as uploaded even if the local file of its name has changed.
        """
        self._path, self._key, self._by_name = path, key, by_name
        self._uploaded: dict[str, UploadedFile] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        earlier = _read(path, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if earlier else "w+b")
        if earlier:
            self._uploaded = {file.name: file for file in earlier.lines}
            self._file.truncate(earlier.end)
            self._file.seek(0, os.SEEK_END)
        else:
            self._write(json.dumps(key).encode())

    def known(self, name: str, path: Path) -> UploadedFile | None:
        """Return the line of a file, unless `path` holds another file by now."""
        known = self._uploaded.get(name)
        if not known or known.sha256 == REFUSED:
            return None
        if not self._by_name and path.exists():
            stat = path.stat()
            return known if (known.bytes, known.mtime) == (stat.st_size, stat.st_mtime_ns) else None
        return known

    def may_copy(self, name: str) -> bool:
        """Return True if no copy of this file was refused."""
        return name not in self._uploaded or self._uploaded[name].sha256 != REFUSED

    def enter(self, file: UploadedFile) -> None:
        """Enter an uploaded file."""
        self._write(msgspec.json.encode(file))

    def _write(self, line: bytes) -> None:
        """Append a line and sync it: the local file may be deleted right afterwards."""
        if self._file:
            self._file.write(line + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def refuse(self, names: Iterable[str]) -> None:
        """Enter files that must be uploaded because the Hub refused a commit with copies of them."""
        for name in names:
            self._uploaded[name] = UploadedFile(name, 0, 0, REFUSED)
            self.enter(self._uploaded[name])

    def remove(self, refused: Iterable[str] = ()) -> None:
        """Remove the journal; if copies were refused, start a new one with their names."""
        self.close()
        if self._path:
            self._path.unlink(missing_ok=True)
            if names := list(refused):
                later = UploadJournal(self._path, self._key)
                later.refuse(names)
                later.close()

    def close(self) -> None:
        """Close the journal and keep it for the next run."""
        if self._file:
            self._file.close()
            self._file = None
