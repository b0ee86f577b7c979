"""How one run reads the Hub: with whose token, and through the cache or a folder that goes when the run ends."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock, Timeout

LOCK = ".lock"


class Session:
    """One run's way of reading repos; `cache` says whether what is downloaded stays in huggingface_hub's cache."""

    def __init__(
        self, token: str | None = None, *, cache: bool = True, notify: Callable[[str], None] | None = None
    ) -> None:
        """`notify` is told of downloads."""
        self.token, self.cache = token, cache
        self.notify: Callable[[str], None] = notify or (lambda _: None)
        self._folder: Path | None = None
        self._lock: FileLock | None = None

    def place(self, repo: str, commit: str) -> Path | None:
        """The folder that files of a commit come to, as they lie in the repo; None for the cache."""
        if self.cache:
            return None
        if self._folder is None:
            self._folder, self._lock = _new_folder()
        return self._folder / f"{repo.replace('/', '--')}@{commit}"

    def close(self) -> None:
        """Remove what was downloaded, unless it is in the cache."""
        if self._folder and self._lock:
            _remove(self._folder, self._lock)
            self._folder = self._lock = None


@contextmanager
def open_session(
    token: str | None, *, cache: bool, notify: Callable[[str], None] | None = None
) -> Iterator[Session]:
    """Open a run's session; what was downloaded without the cache is removed at the end."""
    session = Session(token, cache=cache, notify=notify)
    try:
        yield session
    finally:
        session.close()


def _new_folder() -> tuple[Path, FileLock]:
    """A locked folder on the disk that the cache is on, not in /tmp, which may be memory; killed runs' are removed."""
    from huggingface_hub import constants

    parent = Path(constants.HF_HOME) / "dora_convert" / "visits"
    parent.mkdir(parents=True, exist_ok=True)
    # without it another run might take a folder for left before it is locked
    with FileLock(parent.with_suffix(LOCK)):
        for left in parent.iterdir():
            lock = FileLock(left / LOCK)
            with suppress(Timeout, OSError):
                lock.acquire(timeout=0)
                _remove(left, lock)
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
