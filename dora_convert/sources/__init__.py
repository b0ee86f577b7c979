"""Turn a REF into headers and readable files, on this machine or on the Hub.

`Session` holds a run's settings for the Hub: the token, and the cache or a temporary folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock, Timeout
from typing_extensions import Self

LOCK = ".lock"


class Session:
    """One run's settings for reading repos, for a `with` statement, whose end removes downloads that do not stay.

    With `cache`, downloads stay in huggingface_hub's cache.
    """

    def __init__(
        self,
        token: str | None = None,
        *,
        cache: bool = True,
        notify: Callable[[str], None] | None = None,
        follow_links: bool | None = None,
    ) -> None:
        """`notify` is called with a line about each download.

        `follow_links` says if a side file may be a link out of its folder; None if no side file is copied.
        """
        self.token, self.cache, self.follow_links = token, cache, follow_links
        self.notify: Callable[[str], None] = notify or (lambda _: None)
        self._folder: Path | None = None
        self._lock: FileLock | None = None

    def place(self, repo: str, commit: str) -> Path | None:
        """Return the folder for the files of a commit, laid out as in the repo; None for the cache."""
        return None if self.cache else self.temporary(f"{repo.replace('/', '--')}@{commit}")

    def temporary(self, name: str) -> Path:
        """Return a folder, which need not exist yet, for downloads that do not stay."""
        if self._folder is None:
            self._folder, self._lock = _new_folder()
        return self._folder / name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder and self._lock:
            _remove(self._folder, self._lock)


def _new_folder() -> tuple[Path, FileLock]:
    """Return a new locked folder, and remove those of killed runs.

    The folder is on the cache's disk, not in /tmp, which may be memory.
    """
    from huggingface_hub import constants

    parent = Path(constants.HF_HOME) / "dora_convert" / "visits"
    parent.mkdir(parents=True, exist_ok=True)
    # without this lock another run might take the folder for a killed run's before it is locked
    with FileLock(parent.with_suffix(LOCK)):
        for stale in parent.iterdir():
            lock = FileLock(stale / LOCK)
            with suppress(Timeout, OSError):
                lock.acquire(timeout=0)
                _remove(stale, lock)
        folder = Path(mkdtemp(dir=parent))
        lock = FileLock(folder / LOCK)
        lock.acquire()
    return folder, lock


def _remove(folder: Path, lock: FileLock) -> None:
    for entry in folder.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry, ignore_errors=True)
    lock.release()  # Windows removes no file that is open
    shutil.rmtree(folder, ignore_errors=True)
