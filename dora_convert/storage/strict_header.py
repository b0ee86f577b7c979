"""Parse the header of a safetensors file value by value, if it is not as every library writes it.

Python's reader of JSON alone takes numbers that are no counts, and keys that occur twice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import MalformedError

MAX_DIGITS = 19
Entry = tuple[str, tuple[int, ...], tuple[int, int]]
"""The dtype, the shape, and the offsets of a tensor."""


def parse_strictly(path: Path, raw: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parse a header value by value, and say what is wrong with it."""
    values = _load_json(path, raw)
    metadata = values.pop("__metadata__", None)
    entries = {name: _entry(path, name, value) for name, value in values.items()}
    if not (metadata is None or (isinstance(metadata, dict) and all(map(_is_text, metadata.values())))):
        raise MalformedError(f"{path}: __metadata__ must map strings to strings.")
    return entries, metadata or {}


def _load_json(path: Path, raw: bytes) -> dict[str, Any]:
    """Return the header's JSON, whose numbers are counts; Python's reader alone is less strict."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a key occurs twice")
        return entries

    def count(digits: str) -> int:
        if not digits.isdecimal() or len(digits) > MAX_DIGITS:
            raise ValueError(f"{digits[:30]} is not a number of elements or bytes")
        return int(digits)

    try:
        text = raw.decode()
        header = json.loads(text, object_pairs_hook=unique, parse_int=count, parse_float=count, parse_constant=count)
        if "\\u" in text:  # half a surrogate pair is not a character
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path}: the header is not valid JSON ({error}).") from error
    if not isinstance(header, dict):
        raise MalformedError(f"{path}: the header is not a JSON object.")
    return header


def are_counts(value: object, kind: type[Sequence[Any]] = list) -> TypeGuard[Sequence[int]]:
    """Return True for a list, or another kind of sequence, of numbers of elements or bytes."""
    return isinstance(value, kind) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _entry(path: Path, name: str, entry: Any) -> Entry:
    """Return one header entry, with values of the right types."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) and len(entry) == 3 else {}
    shape, offsets, dtype = fields.get("shape"), fields.get("data_offsets"), fields.get("dtype")
    if not (are_counts(shape) and are_counts(offsets) and len(offsets) == 2 and isinstance(dtype, str)):
        raise MalformedError(f"{path}: the header entry of {name} is malformed.")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _is_text(value: object) -> bool:
    return isinstance(value, str)
