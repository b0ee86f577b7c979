"""What the Hub has of an upload that did not finish: a journal, by name, size and sha256."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from ..storage.journal import Record, read_journal
from ..storage.schema import count

ENTERED = {"name": str, "bytes": count, "mtime": int, "sha256": str}
"""What its records are like."""
REFUSED = "not to be copied"
"""In place of a hash: the Hub would not take a commit with a copy of this file."""


def refusals(path: Path, key: Record) -> frozenset[str] | None:
    """The files that the journal at a path says must not be copied; None where there is none of this upload."""
    earlier = read_journal(path)
    if not earlier or earlier.key != key:
        return None
    latest = {str(record.get("name")): record.get("sha256") for record in earlier.records}
    return frozenset(name for name, proof in latest.items() if proof == REFUSED)


class UploadJournal:
    """A journal of what is up; without a path nothing is remembered."""

    def __init__(self, path: Path | None = None, key: Record | None = None, *, by_name: bool = False) -> None:
        """Go on from the one that is at `path` if it has the same key.

        `by_name`: what is up counts, whatever is here under its name by now.
        """
        self._path, self._key, self._by_name = path, key, by_name
        self._up: dict[str, Record] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        earlier = read_journal(path, ENTERED)
        if earlier and earlier.key != key:
            earlier = None
        path.parent.mkdir(parents=True, exist_ok=True)
        if earlier:
            self._up = {record["name"]: record for record in earlier.records}
        self._file = path.open("r+b" if earlier else "w+b")
        self._file.truncate(earlier.end if earlier else 0)
        self._file.seek(0, os.SEEK_END)
        if not earlier:
            self._write(key)

    def known(self, name: str, path: Path) -> Record | None:
        """What it has of this very file; a file that is not here is taken to be what was uploaded under its name."""
        known = self._up.get(name)
        if known and known["sha256"] == REFUSED:
            return None
        if known and not self._by_name and path.exists():
            stat = path.stat()
            return known if (known["bytes"], known["mtime"]) == (stat.st_size, stat.st_mtime_ns) else None
        return known

    def may_copy(self, name: str) -> bool:
        """Whether no copy of this file was refused."""
        return self._up.get(name, {}).get("sha256") != REFUSED

    def enter(self, name: str, nbytes: int, mtime: int, sha256: str) -> Record:
        """A file that is up; the record of it."""
        record = {"name": name, "bytes": nbytes, "mtime": mtime, "sha256": sha256}
        self._write(record)
        return record

    def _write(self, record: Record | None) -> None:
        """One line, on the disk when this returns: the file may be gone the next moment."""
        if self._file:
            self._file.write(json.dumps(record).encode() + b"\n")
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
