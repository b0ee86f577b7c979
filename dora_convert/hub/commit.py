"""Which files go up when: large ones by themselves and early, the rest with the commit; and from a merge, meanwhile."""

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


def is_large(name: str, size: int) -> bool:
    """Whether a file goes up by itself, before the commit."""
    return size >= LARGE or (is_weight_file(name) and not name.endswith(".json"))


def commit(upload: Upload, folder: Path, names: Sequence[str], readme: bytes, message: str) -> Pushed:
    """Commit what was sent, with the small files and a card, in place of stale weights.

    A card that is in the repo already, and is not one of ours or was edited, is not replaced by one that nobody has
    edited.
    """
    small: dict[str, Path | bytes] = {
        name: folder / name
        for name in names
        if not is_large(name, (folder / name).stat().st_size) and name != card.NAME
    }
    if not (card.is_unedited(readme) and _has_own_card(upload)):
        small[card.NAME] = readme
    return upload.commit(small, stale_weights(upload.there, names), message)


def _has_own_card(upload: Upload) -> bool:
    """Whether the repo has a README that somebody has written."""
    there = upload.read(card.NAME)
    return there is not None and bool(there.strip()) and not card.is_unedited(there)


def stale_weights(there: Collection[str], names: Collection[str]) -> list[str]:
    """Weights in the repo's top folder that a loader would take for part of the model that is pushed."""
    return sorted(
        name
        for name in there
        if name not in names
        and "/" not in name
        and name.startswith(("model", "pytorch_model", *ADAPTER_STEMS))
        and name.endswith((".safetensors", ".bin", ".index.json"))
    )


class Shards:
    """The shards of a merge on their way to the Hub while others are made: one thread, one file at a time."""

    def __init__(self, upload: Upload, folder: Path, sent: Callable[[str], None]) -> None:
        """`sent` is called with the name of each shard that is up."""
        self._upload, self._folder, self._sent = upload, folder, sent
        thread = Background("upload", self._send)
        self.add, self.wait, self.abandon = thread.put, thread.finish, thread.stop

    def _send(self, names: list[str]) -> None:
        for name in names:
            self._upload.send(name, self._folder / name)
            self._sent(name)
