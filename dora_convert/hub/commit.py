"""Split an upload into early files and the commit, and upload a merge's shards as they are finished."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ..formats.detect import FORMATS
from ..output import card
from ..reports.push import Pushed
from ..storage.background import Background
from ..storage.filenames import is_weight_file
from .upload import LARGE, Upload

ADAPTER_STEMS = {name.partition(".")[0] for known in FORMATS for name in known.WEIGHTS}
"""Beginnings of the names of adapters' weight files."""


def is_large(name: str, size: int) -> bool:
    """Return True if a file is uploaded by itself, before the commit."""
    return size >= LARGE or (is_weight_file(name) and not name.endswith(".json"))


def commit(upload: Upload, folder: Path, names: Sequence[str], readme: bytes, message: str) -> Pushed:
    """Commit the uploaded files, the small files and a card, and delete stale weights from the repo.

    A card that somebody has written or edited in the repo is never replaced by a card that nobody has edited.
    """
    small: dict[str, Path | bytes] = {
        name: folder / name
        for name in names
        if not is_large(name, (folder / name).stat().st_size) and name != card.NAME
    }
    if not (card.is_unedited(readme) and _has_own_card(upload)):
        small[card.NAME] = readme
    return upload.commit(small, stale_weights(upload.repo_files, names), message)


def _has_own_card(upload: Upload) -> bool:
    """Return True if the repo has a README that somebody has written or edited."""
    readme = upload.read(card.NAME)
    return readme is not None and bool(readme.strip()) and not card.is_unedited(readme)


def stale_weights(repo_files: Collection[str], names: Collection[str]) -> list[str]:
    """Return weights in the repo's top folder that a loader would mix with the pushed model."""
    return sorted(
        name
        for name in repo_files
        if name not in names
        and "/" not in name
        and name.startswith(("model", "pytorch_model", *ADAPTER_STEMS))
        and name.endswith((".safetensors", ".bin", ".index.json"))
    )


class ShardUploads:
    """Uploads finished shards of a merge while the next ones are computed: one thread, one file at a time."""

    def __init__(self, upload: Upload, folder: Path, on_uploaded: Callable[[str], None]) -> None:
        """Start the thread; `on_uploaded` is called with the name of each uploaded shard."""
        self._upload, self._folder, self._on_uploaded = upload, folder, on_uploaded
        thread = Background("upload", self._send)
        self.add, self.wait, self.abandon = thread.put, thread.finish, thread.stop

    def _send(self, names: list[str]) -> None:
        for name in names:
            self._upload.send(name, self._folder / name)
            self._on_uploaded(name)
