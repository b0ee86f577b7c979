"""Read JSON files that came with somebody's model, and check their values against types; write structs as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

import msgspec
from msgspec import Meta

from ..errors import Fault, MalformedError, RefError, shown
from .filenames import is_plain
from .safetensors import BITS, open_file

Value = TypeVar("Value")


def one_of(*texts: str) -> Meta:
    """Return the constraint that a text is one of these."""
    return Meta(pattern=rf"\A({'|'.join(texts)})\Z")


MAX_JSON, MAX_COMMAS = 64_000_000, 4_000_000
"""Bytes and values of a file, enough for the receipt of 150,000 tensors."""

Count = Annotated[int, Meta(ge=0, lt=2**60)]
"""A number of elements or bytes."""
Real = Annotated[float, Meta(gt=-1e300, lt=1e300)]
"""A finite number; nothing that is stored is larger."""
Dtype = Annotated[str, one_of(*BITS)]
"""A safetensors dtype."""


class ConfigFields(TypedDict, total=False):
    """The fields of a base's config, and of the configs nested in it, that a merge reads."""

    architectures: list[str] | None
    model_type: str | None
    vocab_size: int | None
    num_hidden_layers: int | dict[str, int] | None  # lxmert has a number for each part
    tie_word_embeddings: bool | None
    torch_dtype: str | None
    text_config: dict[str, Any] | None
    quantization_config: dict[str, Any] | None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raise MalformedError for anything else."""
    try:
        with open_file(path) as file:
            raw = file.read(MAX_JSON + 1)
        if len(raw) > MAX_JSON or raw.count(b",") > MAX_COMMAS:
            raise MalformedError(
                f"{path} is too large: JSON is read up to {MAX_JSON // 10**6} MB, {MAX_COMMAS} values."
            )
        text = raw.decode("utf-8-sig")
        value = json.loads(text)
        if "\\u" in text:  # half a surrogate pair is not a character, and cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        near = shown(error.object[max(0, error.start - 20) : error.end + 40])
        raise MalformedError(f"{path} has half of a character near {near}.") from error
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise MalformedError(f"{path} must hold a JSON object.")
    return value


def checked(value: object, form: type[Value], what: str, hint: str | None = None) -> Value:
    """Return a JSON value as a msgspec type; raise MalformedError naming `what` and the wrong field."""
    try:
        return msgspec.convert(value, form)
    except (msgspec.ValidationError, RecursionError) as error:
        raise malformed(error, what, hint) from error


def malformed(error: Exception, what: str, hint: str | None = None) -> MalformedError:
    """Return the error that `what` is not as msgspec says, the field first."""
    why, at, where = str(error).rpartition(" - at `$")
    field = f"{where.strip('.`')}: " if at else ""
    why = why or where
    return MalformedError(f"{what}: {field}{why[:1].lower()}{why[1:]}.", hint=hint)


def read_config(root: Path) -> dict[str, Any] | None:
    """Read a base's config.json; None if the base has no config.json."""
    path = root / "config.json"
    if not os.path.lexists(path):
        return None
    config = read_json(path)
    _check_types(config, path)
    return config


def _check_types(config: Mapping[str, Any], path: Path) -> None:
    """Raise MalformedError if a field that a merge reads, nested fields too, has a wrong type."""
    checked(config, ConfigFields, str(path))
    for value in config.values():
        if isinstance(value, dict):
            _check_types(value, path)


def weight_map(path: Path) -> dict[str, str]:
    """Read an index: the name of each tensor's file, which lies in the same folder."""
    index = read_json(path)
    table = index.get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise MalformedError(f"{path}: weight_map must map tensor names to file names.")
    for filename in sorted(set(table.values())):
        if not is_plain(filename):
            raise MalformedError(f"{path}: {shown(filename)} is not a plain file name.")
    return table


def shard_files(where: str, table: Mapping[str, str], exists: Callable[[str], bool]) -> list[str]:
    """Return the files that an index names, sorted; raise RefError if one does not exist."""
    filenames = sorted(set(table.values()))
    if missing := [Fault(name, "missing") for name in filenames if not exists(name)]:
        raise RefError(f"The index of {where} names {len(missing)} files that do not exist.", faults=missing)
    return filenames


def indexed_files(path: Path) -> tuple[dict[str, str], list[str]]:
    """Read a local index: the name of each tensor's file, and all files."""
    table = weight_map(path)
    return table, shard_files(path.parent.name, table, lambda name: (path.parent / name).exists())


def indented(value: msgspec.Struct, texts: Collection[str]) -> bytes:
    """Return a struct as Python writes it, indented by 1; `texts` are large fields that hold no numbers.

    msgspec writes those in a tenth of the time, and alike. Python's own code for indents would take longer still.
    """
    large = {name: each for name in texts if (each := getattr(value, name))}
    others = msgspec.structs.replace(value, **dict.fromkeys(large, True))
    fields = [
        f'"{name}":'.encode()
        + (msgspec.json.encode(large[name]) if name in large else json.dumps(each, ensure_ascii=False).encode())
        for name, each in msgspec.to_builtins(others).items()
    ]
    return msgspec.json.format(b"{" + b",".join(fields) + b"}", indent=1) + b"\n"
