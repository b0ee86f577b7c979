"""What is finished in OUT.partial, so that the same command can continue it after any kind of end.

`OUT.partial/dora_convert/journal.jsonl`: the first line is the key, each further line one finished copy or tensor. A
line is written only after the bytes it speaks of are synced, and is synced itself before it counts; a torn last line
is as if it were not there. One thread does this in batches, which also keeps the disk busy while workers compute.

The key holds everything that decides bytes: the plan, the contents of the adapters, the identity of the base's files,
versions, device and compute dtype. A journal under another key is never continued.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import MalformedError
from .schema import misfit

NAME = "journal.jsonl"
UPLOADS = "uploads.jsonl"
"""Beside it, in the same form: what of OUT.partial is on the Hub already."""
BATCH_SECONDS = 0.1
_NO_FOLDER_SYNC = {errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}

Record = dict[str, Any]


Pending = tuple[Record, Collection[int], Callable[[], None] | None]


class UnfinishedRun(NamedTuple):
    """The journal of a run that did not finish."""

    key: Record
    records: list[Record]
    end: int
    """Where its last whole line ends."""


def read_journal(path: Path, form: Any = dict) -> UnfinishedRun | None:
    """What an earlier run entered, or None where it did not get as far as a key.

    Raises MalformedError where a record is not of a form: then the journal was not kept by a run of this version.
    """
    records: list[Record] = []
    end = 0
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            if not isinstance(record, dict):
                break
            records.append(record)
            end += len(line)
    for number, record in enumerate(records[1:], 2):
        if where := misfit(record, form):
            raise MalformedError(
                f"{path} is damaged: line {number} has no such {where}.",
                hint="was it edited? without it, what is unfinished cannot be continued",
            )
    return UnfinishedRun(records[0], records[1:], end) if records else None


def sync_path(path: Path) -> None:
    """fsync a file or a folder. Not every system opens folders, and not every file system syncs them."""
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

    def __init__(self, path: Path, key: Record, earlier: UnfinishedRun | None = None) -> None:
        """Start a journal, or continue an earlier one after its last whole line."""
        end = earlier.end if earlier else 0
        self._file = path.open("r+b" if earlier else "w+b")
        self._file.truncate(end)
        self._file.seek(end)
        self._append([] if earlier else [key])  # even of nothing: what was cut off must not come back
        sync_path(path.parent)
        self._pending: list[Pending] = []
        self._changed = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._keep, name="journal", daemon=True)
        self._thread.start()

    def add(
        self, record: Record, descriptors: Collection[int], then: Callable[[], None] | None = None
    ) -> None:
        """Enter a record once the open files that hold its bytes are synced, and do something then."""
        with self._changed:
            if self._error:
                raise self._error
            self._pending.append((record, descriptors, then))
            self._changed.notify()

    def close(self) -> None:
        """Enter what is pending and stop; raises what went wrong on the way."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._file.close()
        if self._error:
            raise self._error

    def _keep(self) -> None:
        try:
            while batch := self._take():
                for descriptor in sorted({each for _, written, _ in batch for each in written}):
                    os.fsync(descriptor)
                self._append([record for record, _, _ in batch])
                for _, _, then in batch:
                    if then:
                        then()
        except BaseException as error:  # noqa: BLE001 - raised again where the caller is
            self._error = error

    def _take(self) -> list[Pending]:
        """Everything pending, gathered for a moment; empty when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closing)
            self._changed.wait_for(lambda: self._closing, BATCH_SECONDS)
            batch, self._pending = self._pending, []
        return batch

    def _append(self, records: Iterable[Record]) -> None:
        self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())
