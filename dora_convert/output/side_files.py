"""Everything in OUT beside weights: the base's files as they are, the few that must change, and what is our own.

Files are copied byte for byte: re-saving them through transformers rewrites tokenizers. Of an adapter's folder only
tokenizer, processor and chat-template files count, and they win over the base's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..plan.plan import Plan
from ..plan.sharding import index_bytes
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import RECORD, list_files
from ..storage.safetensors import open_file
from . import card

FROM_ADAPTER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece*.model", "chat_template*", "additional_chat_templates/*", "*processor_config.json",
    "preprocessor_config.json",
)  # fmt: skip


PREVIOUS = "previous"
"""The folder inside a record that holds the one before."""
PICKLED_INDEX = ".bin.index.json"
"""Names shards that a recovered base does not have: it is written as safetensors."""


@dataclass(frozen=True)
class SideFile:
    """One file of OUT: copied from a path, or made of bytes."""

    name: str
    source: Path | bytes
    fate: str = "copied"  # copied | edited | from the adapter | written
    original: Path | None = None
    """The base's file that it takes the place of, where that has other bytes."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def side_files(plan: Plan) -> list[SideFile]:
    """All files of OUT but the weights and our own record, by name; none where the base is a single file."""
    base, root = plan.base, plan.base.root
    if base.is_file:
        return []
    found = {name: SideFile(name, _readable(root / name)) for name in base.side_files}

    def put(name: str, source: Path | bytes, fate: str) -> None:
        before = root / name
        new = source if isinstance(source, bytes) else source.read_bytes()
        differs = before.is_file() and (before.read_bytes() != new or name == card.NAME)
        found[name] = SideFile(name, source, fate, before if differs else None)

    for adapter in plan.adapters:
        for name in tokenizer_files(adapter.source.path):
            put(name, adapter.source.path / name, "from the adapter")
    if plan.config is not None:
        put("config.json", _json_bytes(plan.config), "edited")
    if plan.index_name:
        put(plan.index_name, index_bytes(plan), "written")
    put(card.NAME, b"", "written")  # its text comes last: see `with_card`
    for path in _earlier_record(base):
        name = f"{RECORD}/{PREVIOUS}/{path.relative_to(root / RECORD).as_posix()}"
        found[name] = SideFile(name, path)
    return [found[name] for name in sorted(found)]


def base_files(base: Checkpoint) -> dict[str, Path]:
    """Every file beside the base's weights that undoing a merge gives back; its index, where it has one, too."""
    if base.is_file:
        return {}
    names = [*base.side_files, card.NAME, *([base.index_name] if base.index_name else [])]
    found = {name: base.root / name for name in names if (base.root / name).is_file()}
    return {name: path for name, path in sorted(found.items()) if not name.endswith(PICKLED_INDEX)}


def originals(base: Checkpoint, files: Sequence[SideFile]) -> dict[str, Path]:
    """Those of them that an output has otherwise, or not at all."""
    out = {file.name: file for file in files}
    return {name: path for name, path in base_files(base).items() if name not in out or out[name].original}


def with_card(files: Sequence[SideFile], made: bytes) -> list[SideFile]:
    """The same files, with another card if there is one among them: OUT of a base that is a single file has none."""
    return [replace(file, source=made) if file.name == card.NAME else file for file in files]


def _readable(path: Path) -> Path:
    """A file that can be copied; said before the merge, not after it."""
    with open_file(path):
        return path


def tokenizer_files(folder: Path) -> list[str]:
    """The tokenizer, processor and chat-template files of a folder, by name."""
    names = list_files(folder)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in FROM_ADAPTER)]


def _earlier_record(base: Checkpoint) -> list[Path]:
    """The record of the merge that made the base, if one did: ours is stacked on it."""
    folder = base.source.path / RECORD
    return [folder / name for name in list_files(folder)] if folder.is_dir() else []


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
