"""Keep files open for threads that read and write by position, but never more than a process may hold open."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MalformedError

MOST_OPEN = 64
SHARE = 4
"""One pool takes this part of the files that the process may open; a run has up to three pools."""


@dataclass
class _OpenFile:
    descriptor: int
    users: int = 0


class OpenFiles:
    """A pool of open files: a file is opened for its first user, and the longest unused one is closed first."""

    def __init__(self, flags: int = os.O_RDONLY) -> None:
        self._flags = flags | getattr(os, "O_BINARY", 0)
        self._lock = threading.Lock()
        self._files: dict[Path, _OpenFile] = {}
        self._most = _most_open()

    @contextmanager
    def using(self, path: Path) -> Iterator[int]:
        """Lend a file's descriptor, which stays open until the end of the block."""
        with self._lock:
            file = self._files.pop(path, None) or _OpenFile(os.open(path, self._flags))
            self._files[path] = file  # as the latest
            file.users += 1
            self._close_unused()
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1

    def _close_unused(self) -> None:
        """Close the longest unused files until the rest are few enough."""
        if (excess := len(self._files) - self._most) <= 0:
            return
        for path in [path for path, file in self._files.items() if not file.users][:excess]:
            os.close(self._files.pop(path).descriptor)

    def forget(self, path: Path) -> None:
        """Close a file that is not used any more."""
        with self._lock:
            if path in self._files:
                os.close(self._files.pop(path).descriptor)

    def __contains__(self, path: Path) -> bool:
        return path in self._files

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popitem()[1].descriptor)


class BoundedFile(io.FileIO):
    """A file that is never read by more than so many bytes at once: zipfile reads a list of records as a whole."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(path)
        self._most = most

    def read(self, size: int | None = -1, /) -> bytes | Any:
        """Return the next bytes."""
        whole = size is None or size < 0
        data = super().read(self._most + 1 if whole else min(size or 0, self._most + 1))
        if data and len(data) > self._most:
            raise MalformedError(f"{self.name} has a part that is too long: at most {self._most} bytes are read.")
        return data


def _most_open() -> int:
    """Return the number of files that one pool keeps open."""
    try:
        import resource
    except ImportError:  # Windows
        return MOST_OPEN
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN if allowed == resource.RLIM_INFINITY else min(MOST_OPEN, allowed // SHARE)
