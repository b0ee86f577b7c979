"""Find tokens of an adapter's tokenizer that the merged model has no row for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from msgspec import DecodeError, Struct, ValidationError, json

from ..naming.resolve import is_embedding
from ..plan.plan import Plan

LARGEST = 1 << 27
"""Larger files are not read for a warning."""


class _Token(Struct):
    id: int


class _Tokenizer(Struct):
    added_tokens: list[_Token] = []


def tokens_without_rows(plan: Plan) -> Iterator[str]:
    """Yield a warning for each adapter whose tokenizer knows more tokens than the embedding has rows."""
    heights = [item.shape[0] for item in plan.items if is_embedding(item.name)]
    for adapter in plan.adapters if heights else ():
        tokens, rows = 1 + _last_token(adapter.source.path), max(heights)
        if tokens > rows:
            yield (
                f"the tokenizer of {adapter.source.name} has {tokens} tokens, the embedding {rows} rows: "
                f"tokens from {rows} on have no row"
            )


def _last_token(folder: Path) -> int:
    """Return the largest id of the tokens that were added to a tokenizer; -1 for none."""
    ids = [-1]
    try:
        if _is_small(path := folder / "added_tokens.json"):
            ids += json.decode(path.read_bytes(), type=dict[str, int]).values()
        if _is_small(path := folder / "tokenizer.json"):
            ids += [token.id for token in json.decode(path.read_bytes(), type=_Tokenizer).added_tokens]
    except (DecodeError, ValidationError, OSError):
        return -1  # loaders will say it
    return max(ids)


def _is_small(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= LARGEST
