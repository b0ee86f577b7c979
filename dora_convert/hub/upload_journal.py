"""What the Hub has of an upload that did not finish: a journal, by name, size and sha256."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec

from ..storage.journal import JournalKey, read_journal
from ..storage.json_files import Count

REFUSED = "not to be copied"
"""In place of a hash: the Hub would not take a commit with a copy of this file."""


class UploadedFile(msgspec.Struct, frozen=True):
    """A line of the journal: a file that is uploaded, as it was on this machine."""

    name: str
    bytes: Count
    mtime: int
    sha256: str


def refusals(path: Path, key: JournalKey) -> frozenset[str] | None:
    """The files that the journal at a path says must not be copied; None where there is none of this upload."""
    earlier = read_journal(path)
    if not earlier or earlier.key != key:
        return None
    latest = {str(line.get("name")): line.get("sha256") for line in earlier.lines}
    return frozenset(name for name, proof in latest.items() if proof == REFUSED)


class UploadJournal:
    """A journal of what is up; without a path nothing is remembered."""

    def __init__(
        self, path: Path | None = None, key: JournalKey | None = None, *, by_name: bool = False
    ) -> None:
        """Go on from the one that is at `path` if it has the same key.

        `by_name`: what is up counts, whatever is here under its name by now.
        """
        self._path, self._key, self._by_name = path, key, by_name
        self._up: dict[str, UploadedFile] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        earlier = read_journal(path, UploadedFile)
        if earlier and earlier.key != key:
            earlier = None
        path.parent.mkdir(parents=True, exist_ok=True)
        if earlier:
            self._up = {file.name: file for file in earlier.lines}
        self._file = path.open("r+b" if earlier else "w+b")
        self._file.truncate(earlier.end if earlier else 0)
        self._file.seek(0, os.SEEK_END)
        if not earlier:
            self._write(json.dumps(key).encode())

    def known(self, name: str, path: Path) -> UploadedFile | None:
        """What it has of this very file; a file that is not here is taken to be what was uploaded under its name."""
        known = self._up.get(name)
        if known and known.sha256 == REFUSED:
            return None
        if known and not self._by_name and path.exists():
            stat = path.stat()
            return known if (known.bytes, known.mtime) == (stat.st_size, stat.st_mtime_ns) else None
        return known

    def may_copy(self, name: str) -> bool:
        """Whether no copy of this file was refused."""
        known = self._up.get(name)
        return known is None or known.sha256 != REFUSED

    def enter(self, name: str, nbytes: int, mtime: int, sha256: str) -> UploadedFile:
        """Enter a file that is uploaded; return its line."""
        file = UploadedFile(name, nbytes, mtime, sha256)
        self._write(msgspec.json.encode(file))
        return file

    def _write(self, line: bytes) -> None:
        """One line, on the disk when this returns: the file may be gone the next moment."""
        if self._file:
            self._file.write(line + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def forget(self, copies: Iterable[str] = ()) -> None:
        """Remove it; of `copies`, which the Hub would not take, it stays known that they must be uploaded."""
        self.close()
        if self._path:
            self._path.unlink(missing_ok=True)
            if names := list(copies):
                later = UploadJournal(self._path, self._key)
                later.refuse(names)
                later.close()

    def refuse(self, names: Iterable[str]) -> None:
        """Files that must be uploaded: the Hub would not take a commit with copies of them."""
        for name in names:
            self._up[name] = self.enter(name, 0, 0, REFUSED)

    def close(self) -> None:
        """What it holds stays for the next run."""
        if self._file:
            self._file.close()
            self._file = None
