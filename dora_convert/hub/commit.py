"""Commit a folder: its large files first, one by one, then the small files and a card at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from ..formats.detect import ANCHORS
from ..output import card
from ..reports.push import Pushed
from ..storage.filenames import is_weight_file
from .upload import LARGE, Upload

ADAPTER_STEMS = {"adapter_model", *(name.partition(".")[0] for name in ANCHORS[1:])}
"""Beginnings of the names of adapters' weight files."""


def commit_folder(
    upload: Upload,
    folder: Path,
    names: Sequence[str],
    readme: bytes,
    message: str,
    *,
    edited: Mapping[str, bytes],
    on_sent: Callable[[int], None] = lambda _: None,
) -> Pushed:
    """Upload the large files that are not uploaded yet, commit everything, and delete stale weights from the repo.

    `edited` holds the files that are uploaded with other bytes than the folder's. `on_sent` is called with
    the size of each large file. A card that somebody has written or edited in the
    repo is never replaced by a card that nobody has edited.
    """
    small: dict[str, Path | bytes] = {}
    for name in names:
        path = folder / name
        size = path.stat().st_size
        if name in edited:
            small[name] = edited[name]
        elif size < LARGE and (not is_weight_file(name) or name.endswith(".json")):
            small[name] = path
        elif not upload.has(name):
            upload.send(name, path)
            on_sent(size)
    small[card.NAME] = readme
    if card.is_unedited(readme) and _has_own_card(upload):
        del small[card.NAME]
    return upload.commit(small, _stale_weights(upload.repo_files, names), message)


def _has_own_card(upload: Upload) -> bool:
    """Return True if the repo has a README that somebody has written or edited."""
    readme = upload.read(card.NAME)
    return readme is not None and bool(readme.strip()) and not card.is_unedited(readme)


def _stale_weights(repo_files: Collection[str], names: Collection[str]) -> list[str]:
    """Return weights in the repo's top folder that a loader would mix with the pushed model."""
    return sorted(
        name
        for name in repo_files
        if name not in names
        and "/" not in name
        and name.startswith(("model", "pytorch_model", *ADAPTER_STEMS))
        and name.endswith((".safetensors", ".bin", ".index.json"))
    )
