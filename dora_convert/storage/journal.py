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
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from .json_files import malformed

BATCH_SECONDS = 0.1
_NO_FOLDER_SYNC = {errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}

JournalKey = dict[str, Any]
JournalLine = Any
"""A msgspec Struct, or a JSON object."""
Lines = Sequence[tuple[JournalLine, Callable[[], None] | None]]
"""Lines, each with what is called once it is synced."""


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


def sync_path(path: Path, *, forget: bool = False) -> None:
    """Sync a file or a folder to the disk; some systems open no folders, some file systems sync none.

    With `forget`, the file's pages leave the page cache, if the system can be asked to.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(descriptor)
            if forget and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not folder or error.errno not in _NO_FOLDER_SYNC:
            raise


class Journal:
    """An open journal and the thread that keeps it."""

    def __init__(
        self,
        path: Path,
        key: JournalKey,
        earlier: UnfinishedRun | None = None,
        *,
        sync: Callable[[Path], None] = sync_path,
    ) -> None:
        """Start a journal, or resume an earlier one after its last whole line; `sync` syncs a file of bytes."""
        self._sync = sync
        end = earlier.end if earlier else 0
        self._file = path.open("r+b" if earlier else "w+b")
        self._file.truncate(end)
        self._file.seek(end)
        self._append([] if earlier else [json.dumps(key).encode()])  # also syncs the truncation
        sync_path(path.parent)
        self._thread = Background("journal", self._keep, gather=BATCH_SECONDS)

    def add(self, line: JournalLine, files: Collection[Path], then: Callable[[], None] | None = None) -> None:
        """Write a line once the files that hold its bytes are synced; call `then` after that."""
        self.add_all([(line, then)], files)

    def add_all(self, lines: Lines, files: Collection[Path]) -> None:
        """Write some lines, each with what is called after it, once the files that hold their bytes are synced."""
        if lines:
            self._thread.put((lines, files))

    def close(self) -> None:
        """Write the pending lines and stop; raise the error of the thread, if it had one."""
        try:
            self._thread.finish()
        finally:
            self._file.close()

    def _keep(self, batch: list[tuple[Lines, Collection[Path]]]) -> None:
        """Sync the files that lines speak of, write the lines, and call what comes after."""
        for path in sorted({each for _, files in batch for each in files}):
            self._sync(path)
        self._append([msgspec.json.encode(line) for lines, _ in batch for line, _ in lines])
        for then in (then for lines, _ in batch for _, then in lines if then):
            then()

    def _append(self, lines: Iterable[bytes]) -> None:
        self._file.write(b"".join(line + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())


Task = TypeVar("Task")


class Background(Generic[Task]):
    """A thread that does tasks in the order they are put; its first error ends it.

    The thread starts with the first task. `changed` guards the state that the caller shares with the thread.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[Task]], None],
        *,
        claim: Callable[[], bool] = lambda: True,
        gather: float | None = None,
    ) -> None:
        """`work` gets one task at a time; with `gather`, all tasks that came within so many seconds.

        `claim` is called with `changed` held before a task is taken. The task waits until `claim` returns
        True.
        """
        self.changed = threading.Condition()
        self.closed = False
        self._work, self._claim, self._gather = work, claim, gather
        self._tasks: list[Task] = []
        self._busy = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def put(self, task: Task) -> None:
        """Add a task; raise the error that ended the thread, if one did."""
        with self.changed:
            self.check()
            self._tasks.append(task)
            if not self._thread.ident:
                self._thread.start()
            self.changed.notify_all()

    def check(self) -> None:
        """Raise the error that ended the thread, if one did."""
        if self._error:
            raise self._error

    def fail(self, error: BaseException) -> None:
        """Wake everyone who waits, with an error from elsewhere."""
        with self.changed:
            self._error = self._error or error
            self.changed.notify_all()

    def wait_for(self, ready: Callable[[], bool]) -> bool:
        """Wait until `ready`, an error or the end; raise the error, and return True if `ready`."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self._error or ready())
            self.check()
            return ready()

    def finish(self) -> None:
        """Wait until all tasks are done; raise the error that ended the thread, if one did."""
        self._close()
        if self._thread.ident:
            self._thread.join()
        self.check()

    def idle(self, seconds: float) -> bool:
        """Wait until no task is left, at most so many seconds; raise the error that ended the thread."""
        with self.changed:
            self.changed.wait_for(lambda: self._error or not (self._tasks or self._busy), seconds)
            self.check()
            return not (self._tasks or self._busy)

    def stop(self, *, wait: bool = False) -> None:
        """Drop all tasks that wait; with `wait`, wait for the task at work."""
        with self.changed:
            self._tasks.clear()
            self._close()
        if wait and self._thread.ident:
            self._thread.join()

    def _close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def _run(self) -> None:
        try:
            while tasks := self._take():
                self._work(tasks)
        except BaseException as error:  # noqa: BLE001 - raised again in the threads that wait
            self.fail(error)

    def _take(self) -> list[Task]:
        """Return the tasks to do next; none at the end."""
        with self.changed:
            self._busy = False
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.closed or (self._tasks and self._claim()))
            if self._gather is not None:
                self.changed.wait_for(lambda: self.closed, self._gather)
            count = 1 if self._gather is None else len(self._tasks)
            taken, self._tasks = self._tasks[:count], self._tasks[count:]
            self._busy = bool(taken)
        return taken
