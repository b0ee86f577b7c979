"""Decide the files beside the weights: the base's, the adapters' tokenizers, and those that must change.

Files are copied byte for byte, because transformers rewrites tokenizers when it saves them. From an adapter's
folder only tokenizer, chat template and processor are taken. Each is a set: all of its files come from one folder,
and the base's files of the set are left out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import MalformedError
from ..plan.plan import Plan
from ..plan.sharding import index_bytes
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import PROCESSOR, RECORD, TEMPLATE, TOKENIZER, is_tokenizer_file, list_files, matching
from ..storage.json_files import read_json
from ..storage.reader import same_contents, xxh3
from ..storage.refs import Source
from ..storage.safetensors import open_file
from . import card

WHOLE_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model")
"""Files without which there is no tokenizer; further ones alone replace nothing."""

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
    if base.is_bare:
        return []
    files = {name: SideFile(name, _readable(root / name)) for name in base.side_files}

    def put(name: str, source: Path | bytes, fate: str) -> None:
        before = root / name
        differs = before.is_file() and (name == card.NAME or not same_contents(before, source))
        files[name] = SideFile(name, source, fate, before if differs else None)

    adopted_of = adopted_sets(plan)
    files |= _made(base, [pattern for adopted in adopted_of for pattern in adopted.patterns])
    for adopted in adopted_of:
        for name in adopted.replaced(base):
            del files[name]
        for name in adopted.files:
            put(name, adopted.source.path / name, "from the adapter")
    if plan.config is not None:
        put("config.json", _json_bytes(plan.config), "edited")
    files = {name: file for name, file in files.items() if plan.files.get(name, {}) is not None}
    for name in plan.files.keys() & files.keys():
        put(name, _json_bytes(plan.files[name] or {}), "edited")
    if plan.index_name:
        put(plan.index_name, index_bytes(plan), "written")
    put(card.NAME, b"", "written")  # the text comes last: see `with_card`
    for path in _previous_record(base):
        name = f"{RECORD}/{PREVIOUS}/{path.relative_to(root / RECORD).as_posix()}"
        files[name] = SideFile(name, path)
    return [files[name] for name in sorted(files)]


def _made(base: Checkpoint, others: Sequence[str]) -> dict[str, SideFile]:
    """Return the tokenizer of a GGUF base, made from its pairs, unless it has or gets another one."""
    if not base.gguf or matching(base.side_files, TOKENIZER) or set(TOKENIZER) <= set(others):
        return {}
    from ..storage.gguf_tokenizer import make_tokenizer

    made = make_tokenizer(base.gguf)
    return {name: SideFile(name, made[name], "written") for name in made.keys() - set(matching(made, others))}


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


@dataclass(frozen=True)
class AdoptedSet:
    """A tokenizer, chat template or processor that an adapter brings, and all files of its kind."""

    what: str
    patterns: tuple[str, ...]
    source: Source
    rivals: tuple[str, ...] = ()
    """The other adapters that bring one of the kind with other bytes."""

    @property
    def files(self) -> list[str]:
        """The files of the set."""
        return matching(list_files(self.source.path), self.patterns)

    def replaced(self, base: Checkpoint) -> list[str]:
        """Return the base's files of the kind."""
        return matching(base.side_files, self.patterns)

    def notice(self, base: Checkpoint) -> str:
        """Return the sentence that says where the set comes from."""
        gone = ", ".join(name for name in self.replaced(base) if name not in self.files)
        rivals = f"; {' and '.join(self.rivals)} would bring another" if self.rivals else ""
        return f"{self.what}: from {self.source.name}" + rivals + (f"; left out of the base's: {gone}" if gone else "")


def adopted_sets(plan: Plan) -> list[AdoptedSet]:
    """Return the sets that adapters bring, each from the last adapter that has one."""
    sources = [adapter.source for adapter in plan.adapters]
    tokenizers = [source for source in sources if _has(source, WHOLE_TOKENIZER)]
    last = tokenizers[-1:]
    templates = [source for source in sources if _has(source, TEMPLATE) or (source in last and _has_field(source))]
    processors = [source for source in sources if _has(source, PROCESSOR)]
    return [
        AdoptedSet(what, patterns, found[-1], _rivals(found, patterns))
        for what, patterns, found in (
            ("tokenizer", TOKENIZER, tokenizers),
            ("chat template", TEMPLATE, templates),
            ("processor", PROCESSOR, processors),
        )
        if found
    ]


def _rivals(sources: Sequence[Source], patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the folders whose files of a set differ from those of the last one."""
    sets = [
        {name: xxh3(source.path / name) for name in matching(list_files(source.path), patterns)} for source in sources
    ]
    return tuple(source.name for source, files in zip(sources, sets, strict=True) if files != sets[-1])


def _has(source: Source, patterns: Sequence[str]) -> bool:
    return bool(matching(list_files(source.path), patterns))


def _has_field(source: Source) -> bool:
    """Return True if a folder's tokenizer_config.json holds a chat template."""
    with suppress(MalformedError, OSError):
        return bool(read_json(source.path / "tokenizer_config.json").get("chat_template"))
    return False


def tokenizer_files(folder: Path) -> list[str]:
    """Return the tokenizer, chat template and processor files of a folder, by name."""
    return list(filter(is_tokenizer_file, list_files(folder)))


def _previous_record(base: Checkpoint) -> list[Path]:
    """Return the files of the record of the merge that wrote the base, if a merge did."""
    folder = base.source.path / RECORD
    return [folder / name for name in list_files(folder)] if folder.is_dir() else []


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
