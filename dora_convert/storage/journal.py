"""Keep the journal of a run, a line for each finished copy or tensor, so that the same command can resume.

`OUT.partial/dora_convert/journal.jsonl`: the first line is the key, each further line one finished copy or
tensor. A line is written only after the bytes that it names are synced, and counts once it is synced itself.
A torn last line does not count. One thread writes in batches, which also keeps the disk busy while workers
compute.

The key holds everything that decides bytes: the plan, the contents of the adapters, the identity of the
base's files, versions, device and compute dtype. A journal under another key is never resumed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from .background import Background
from .json_files import malformed

BATCH_SECONDS = 0.1
_NO_FOLDER_SYNC = {errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}

JournalKey = dict[str, Any]
JournalLine = Any
"""A msgspec Struct, or a JSON object."""


class UnfinishedRun(NamedTuple):
    """The journal of a run that did not finish."""

    key: JournalKey
    lines: list[JournalLine]
    end: int
    """The byte after the last whole line."""


def read_journal(path: Path, line_type: Any = dict[str, Any]) -> UnfinishedRun | None:
    """Read the journal of an earlier run; None if the run did not get as far as a key.

    Raises MalformedError if a line is not of `line_type`: then no run of this version wrote the journal.
    """
    key: JournalKey = {}
    raw: list[bytes] = []
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        for line in path.read_bytes().splitlines(keepends=True):
            value = json.loads(line)
            if not line.endswith(b"\n") or not isinstance(value, dict):
                break
            key = key if raw else value
            raw.append(line)
    try:
        lines = [msgspec.json.decode(line, type=line_type) for line in raw[1:]]
    except (msgspec.DecodeError, RecursionError) as error:
        hint = "was the journal edited? without it, the unfinished run cannot be resumed"
        raise malformed(error, f"{path} is damaged", hint) from error
    return UnfinishedRun(key, lines, sum(map(len, raw))) if raw else None


def sync_path(path: Path) -> None:
    """Sync a file or a folder to the disk; some systems open no folders, some file systems sync none."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not folder or error.errno not in _NO_FOLDER_SYNC:
            raise


class Journal:
    """An open journal and the thread that keeps it."""

    def __init__(self, path: Path, key: JournalKey, earlier: UnfinishedRun | None = None) -> None:
        """Start a journal, or resume an earlier one after its last whole line."""
        end = earlier.end if earlier else 0
        self._file = path.open("r+b" if earlier else "w+b")
        self._file.truncate(end)
        self._file.seek(end)
        self._append([] if earlier else [json.dumps(key).encode()])  # also syncs the truncation
        sync_path(path.parent)
        self._thread = Background("journal", self._keep, gather=BATCH_SECONDS)

    def add(self, line: JournalLine, files: Collection[Path], then: Callable[[], None] | None = None) -> None:
        """Write a line once the files that hold its bytes are synced; call `then` after that."""
        self._thread.put((line, files, then))

    def close(self) -> None:
        """Write the pending lines and stop; raise the error of the thread, if it had one."""
        try:
            self._thread.finish()
        finally:
            self._file.close()

    def _keep(self, batch: list[tuple[JournalLine, Collection[Path], Callable[[], None] | None]]) -> None:
        """Sync the files that lines speak of, write the lines, and call what comes after."""
        for path in sorted({each for _, files, _ in batch for each in files}):
            sync_path(path)
        self._append([msgspec.json.encode(line) for line, _, _ in batch])
        for _, _, then in batch:
            if then:
                then()

    def _append(self, lines: Iterable[bytes]) -> None:
        self._file.write(b"".join(line + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())
