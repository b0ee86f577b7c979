"""Find paths of this machine in the configs and the card of a folder, and replace them in what is uploaded.

The folder itself stays as it is. Of a README only the front matter is searched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters import Adapter
from ..errors import Fault, MalformedError, RefError, UsageError
from ..output import card
from ..storage.filenames import RECEIPT, RECORD
from ..storage.json_files import read_json

BASE = "base_model_name_or_path"
"""The field of an adapter's config that loaders need."""
FILES = ("tokenizer_file", "best_model_checkpoint")
"""Fields of configs that hold a path for which no repo can stand."""
FIELDS = (BASE, "_name_or_path", "name_or_path", *FILES)
"""Fields of configs that hold the name or path that something was loaded from."""
_LOCAL = re.compile(r"(?i)/|~|\.{1,2}([/\\]|$)|[a-z]:[/\\]|\\\\|file:")
_TAG = re.compile(r"base_model:(?:(?:adapter|finetune|merge|quantized):)?")


def is_local(name: object) -> bool:
    """Return True if a name is a path of some machine, and not the name of a repo."""
    if not isinstance(name, str) or name.startswith("hf://"):
        return False
    return bool(_LOCAL.match(name)) or "\\" in name or name.count("/") > 1


class Outgoing:
    """The card of a folder, and the files whose uploaded bytes differ from the folder's."""

    def __init__(self, folder: Path, base: str | None, *, given: bool, notify: Callable[[str], None]) -> None:
        """Begin with no files; `base` is the base's repo id, if it is known, and `given` if the caller named it."""
        self.files: dict[str, bytes] = {}
        self._folder, self._base, self._given, self._notify = folder, base, given, notify
        self._faults: list[Fault] = []

    def add_configs(self, names: Iterable[str]) -> None:
        """Replace paths in the configs among some files of the folder; a receipt follows the replaced files."""
        for name in names:
            if name.endswith(("config.json", "trainer_state.json")) and not name.startswith(f"{RECORD}/"):
                self._add_config(name)
        receipt = self._folder / RECORD / RECEIPT
        if self.files and receipt.is_file():
            value = read_json(receipt)
            proofs = value.get("base_files", {})
            value["base_files"] = proofs | dict.fromkeys(proofs.keys() & self.files.keys())
            self.files[f"{RECORD}/{RECEIPT}"] = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()

    def _add_config(self, name: str) -> None:
        try:
            config = read_json(self._folder / name)
        except MalformedError:  # a file that no reader of ours needs
            return
        edited = self._replaced(name, config)
        if edited != config:
            self.files[name] = (json.dumps(edited, indent=2, ensure_ascii=False) + "\n").encode()

    def _replaced(self, file: str, value: Any) -> Any:
        """Return a JSON value with other names in place of paths; note what is replaced, and what cannot be."""
        if not isinstance(value, dict):
            return value
        fields = {}
        for key, old in value.items():
            new = self._name(file, key, old) if key in FIELDS else self._replaced(file, old)
            if new is not None or old is None:
                fields[key] = new
        return fields

    def _name(self, file: str, key: str, old: object) -> object:
        """Return the name to upload instead of a field's value; None to leave the field out."""
        if not (is_local(old) or (self._given and key == BASE and old and "/" not in str(old))):
            return old
        if key in FILES or (key != BASE and not self._base):
            self._notify(f"{file} goes up without {key}, a path of this machine: {old}")
            return None
        if not self._base:
            self._faults.append(Fault(file, f"{key} is {old}"))
            return old
        self._notify(f"{file} goes up with {key} {self._base} in place of {old}")
        return self._base

    def add_card(self, readme: bytes, relation: str) -> None:
        """Add a README, with the base's repo id; a base that somebody wrote into the README is kept."""
        self.files[card.NAME] = readme
        fields = card.front_matter(readme)
        bases = _bases(fields)
        paths = [name for name in (*bases, *_tagged(fields)) if is_local(name)]
        if paths and not self._base:
            self._faults.append(Fault(card.NAME, f"base_model is {paths[0]}"))
        unedited = card.is_unedited(readme)
        if not self._base or bases == [self._base] or not (paths or self._given):
            return
        if bases and not paths and not unedited:
            self._notify(f"{card.NAME} was edited and names {', '.join(bases)} as its base: it goes up as it is")
            return
        tags = [_renamed(tag, self._base) for tag in fields.get("tags") or ()]
        self.files[card.NAME] = _with_base(readme, self._base, relation if unedited else None, tags)
        self._notify(f"{card.NAME} goes up with base_model {self._base}")

    def refuse_paths(self) -> None:
        """Raise RefError for paths that no known name can replace."""
        if self._faults:
            raise RefError(
                f"{self._faults[0].what} names a path of this machine as the base.",
                faults=tuple(self._faults),
                hint="--base-model org/name replaces it in what is uploaded",
            )


def _with_base(readme: bytes, base_model: str, relation: str | None, tags: Sequence[object]) -> bytes:
    """Return a README with another base and other tags; a card of `render` stays one that nobody has edited."""
    from huggingface_hub import ModelCard

    unedited = card.is_unedited(readme)
    edited = ModelCard(card.MARK.sub(b"", readme).decode(), ignore_metadata_errors=True)
    edited.data["base_model"], edited.data["tags"] = base_model, list(tags) or None
    if relation:
        edited.data["base_model_relation"] = relation
    return card.marked(str(edited)) if unedited else str(edited).encode()


def base_of(readme: bytes) -> str | None:
    """Return the repo that a README names as its only base."""
    bases = _bases(card.front_matter(readme))
    return bases[0] if len(bases) == 1 and not is_local(bases[0]) else None


def refuse_path(adapter: Adapter, base: str | None) -> None:
    """Refuse an adapter that cannot be uploaded because it names a path as its base, and no repo is known."""
    if not base and is_local(adapter.base):
        raise UsageError(
            f"{adapter.source.name} names {adapter.base}, a path of this machine, as its base: it cannot be uploaded.",
            hint="--base-model org/name replaces the path",
        )


def _bases(fields: Mapping[str, Any]) -> list[str]:
    """Return the bases that a card names, by repo or path."""
    named = fields.get("base_model") or []
    return [name for name in ([named] if isinstance(named, str) else named) if isinstance(name, str)]


def _tagged(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the bases that the tags of a card name."""
    for tag in fields.get("tags") or ():
        if isinstance(tag, str) and (match := _TAG.match(tag)):
            yield tag[match.end() :]


def _renamed(tag: object, base: str) -> object:
    """Return a tag with the base's repo id in place of a path."""
    match = _TAG.match(tag) if isinstance(tag, str) else None
    return f"{match[0]}{base}" if match and is_local(str(tag)[match.end() :]) else tag
