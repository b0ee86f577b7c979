"""Decide the files beside the weights: the base's, the adapters' tokenizers, and those that must change.

Files are copied byte for byte, because transformers rewrites tokenizers when it saves them. From an adapter's
folder only tokenizer, processor and chat-template files are taken; they replace the base's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import MalformedError
from ..plan.plan import Plan
from ..plan.sharding import index_bytes
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import RECORD, is_tokenizer_file, list_files
from ..storage.reader import same_contents
from ..storage.safetensors import open_file
from . import card

PREVIOUS = "previous"
"""The folder inside a record that holds the previous merge's record."""
PICKLED_INDEX = ".bin.index.json"
"""The index of pickled shards, which a recovered base does not have: it is written as safetensors."""


@dataclass(frozen=True)
class SideFile:
    """One file of OUT: copied from a path, or written from bytes."""

    name: str
    source: Path | bytes
    fate: str = "copied"  # copied | edited | from the adapter | written
    original: Path | None = None
    """The base's file of the same name, if its bytes differ."""

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def side_files(plan: Plan) -> list[SideFile]:
    """Return all files of OUT but weights and record, by name; none if the base is a single file."""
    base, root = plan.base, plan.base.root
    if base.is_file:
        return []
    files = {name: SideFile(name, _readable(root / name)) for name in base.side_files}

    def put(name: str, source: Path | bytes, fate: str) -> None:
        before = root / name
        differs = before.is_file() and (name == card.NAME or not same_contents(before, source))
        files[name] = SideFile(name, source, fate, before if differs else None)

    for adapter in plan.adapters:
        for name in tokenizer_files(adapter.source.path):
            put(name, adapter.source.path / name, "from the adapter")
    if plan.config is not None:
        put("config.json", _json_bytes(plan.config), "edited")
    if plan.index_name:
        put(plan.index_name, index_bytes(plan), "written")
    put(card.NAME, b"", "written")  # the text comes last: see `with_card`
    for path in _previous_record(base):
        name = f"{RECORD}/{PREVIOUS}/{path.relative_to(root / RECORD).as_posix()}"
        files[name] = SideFile(name, path)
    return [files[name] for name in sorted(files)]


def base_files(base: Checkpoint) -> dict[str, Path]:
    """Return every file beside the base's weights that an unmerge restores, the index included."""
    if base.is_file:
        return {}
    names = [*base.side_files, card.NAME, *([base.index_name] if base.index_name else [])]
    kept = sorted(name for name in names if not name.endswith(PICKLED_INDEX))
    return {name: base.root / name for name in kept if (base.root / name).is_file()}


def originals(base: Checkpoint, files: Sequence[SideFile]) -> dict[str, Path]:
    """Return the base's files that an output changes or leaves out."""
    out = {file.name: file for file in files}
    return {name: path for name, path in base_files(base).items() if name not in out or out[name].original}


def with_card(files: Sequence[SideFile], text: bytes) -> list[SideFile]:
    """Return the same files with the card's text; a single file as base has no card."""
    return [replace(file, source=text) if file.name == card.NAME else file for file in files]


def copy_or_write(path: Path, source: bytes | Path) -> None:
    """Write a small file, or copy one; the umask decides its permissions."""
    if isinstance(source, bytes):
        path.write_bytes(source)
        return
    try:
        source.open("rb").close()
    except OSError as error:  # the input's fault, not OUT's
        raise MalformedError(f"{source} cannot be read: {error.strerror or error}.") from error
    shutil.copyfile(source, path)


def _readable(path: Path) -> Path:
    """Return a path after the proof that the file can be read, so that the error comes before the merge."""
    with open_file(path):
        return path


def tokenizer_files(folder: Path) -> list[str]:
    """Return the tokenizer, processor and chat-template files of a folder, by name."""
    return list(filter(is_tokenizer_file, list_files(folder)))


def _previous_record(base: Checkpoint) -> list[Path]:
    """Return the files of the record of the merge that wrote the base, if a merge did."""
    folder = base.source.path / RECORD
    return [folder / name for name in list_files(folder)] if folder.is_dir() else []


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
