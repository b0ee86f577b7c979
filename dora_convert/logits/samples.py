"""Prompts as token ids: through the tokenizer that lies beside a model, or ids that stand for themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .forward import CONTINUATION, Batch
from .prompts import BUILT_IN, LENGTH, LONGEST

TOGETHER = 8
"""Prompts that go through a model at once."""
ENCODERS = ("ForSequenceClassification", "ForQuestionAnswering")
"""Models with a decoder that make its inputs themselves."""


@dataclass(frozen=True)
class Samples:
    """What models are asked, in batches of one length."""

    batches: tuple[Batch, ...]
    notes: tuple[str, ...]

    @property
    def count(self) -> int:
        """Prompts in all."""
        return sum(len(batch.ids) for batch in self.batches)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, with what is said after it."""
        return max(batch.ids.shape[1] for batch in self.batches) + CONTINUATION + 1

    @property
    def tokens(self) -> int:
        """Tokens that go through a model at once, at the most."""
        return max(len(batch.ids) * (batch.ids.shape[1] + CONTINUATION + 1) for batch in self.batches)


def make_samples(texts: Sequence[str], folders: Sequence[Path], name: str, config: Any) -> Samples:
    """Ids for a caller's prompts, or for the built-in ones; `folders` may hold a tokenizer, the first one that does counts.

    `name` is the model's class, such as LlamaForCausalLM.

    Raises UnsupportedError where a caller's text cannot be made into ids.
    """
    known = vocabulary(config)
    tokenizer = next(filter(None, map(_tokenizer, folders)), None)
    room = _room(config)
    notes = []
    if tokenizer is not None:
        limit = min(LONGEST if texts else LENGTH, room)
        rows = [_ids(tokenizer, text, limit) for text in texts or BUILT_IN]
        if texts and any(len(row) == limit for row in rows):
            notes.append(f"prompts are cut at {limit} tokens")
    elif texts:
        raise UnsupportedError(
            "There is no tokenizer for the prompts beside BASE or ADAPTER.",
            hint="without --prompt and --prompts, token ids are made up",
        )
    else:
        rows = _made_up(known, min(LENGTH, room), config)
        notes.append(f"no tokenizer; {len(rows)} prompts of made-up token ids")
    rows = [row for row in rows if row]
    if not rows or max(map(max, rows)) >= known:
        raise UnsupportedError(
            "The tokenizer's ids are not those of the model.", hint="verify --level weights"
        )
    return Samples(tuple(_batched(rows, name, config)), tuple(notes))


def vocabulary(config: Any) -> int:
    """How many tokens a model knows.

    Raises UnsupportedError for models that know none.
    """
    if not isinstance(size := getattr(_text(config), "vocab_size", None), int):
        raise UnsupportedError(
            "The model is not asked with text.", hint="verify --level weights needs no model code"
        )
    return size


def _text(config: Any) -> Any:
    """The part of a config that is about text, where there is just one."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return config


def _room(config: Any) -> int:
    """Tokens that a prompt may have, with those said after it; a few positions are some models' own."""
    positions = getattr(_text(config), "max_position_embeddings", None) or LONGEST * 2
    return max(1, min(LONGEST, positions - CONTINUATION - 4))


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, or None where there is none that works."""
    import transformers

    if not any(
        (folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    ):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return tokenizer if tokenizer("a b")["input_ids"] else None
    except Exception:  # noqa: BLE001 - whatever is wrong with it, there are made-up ids
        return None


def _ids(tokenizer: Any, text: str, limit: int) -> list[int]:
    return [int(token) for token in tokenizer(text, truncation=True, max_length=limit)["input_ids"]]


def _made_up(vocabulary: int, length: int, config: Any) -> list[list[int]]:
    """Ids from all over the vocabulary, the same each time; none that ends or pads a text, but one end for a decoder."""
    end = getattr(config, "eos_token_id", None)
    special = {getattr(config, key, None) for key in ("pad_token_id", "eos_token_id")}
    usable = (
        [token for token in range(vocabulary) if token not in special]
        if vocabulary < 1000
        else range(3, vocabulary)
    )
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(usable), (len(BUILT_IN), length), generator=generator).tolist()
    tail = [end] if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) else []
    return [[usable[k] for k in row][: length - len(tail)] + tail for row in chosen]


def _batched(rows: Sequence[list[int]], name: str, config: Any) -> Iterator[Batch]:
    """Prompts of one length together: none is padded. Classifiers may look for padding, so theirs go alone."""
    together = 1 if name.endswith("ForSequenceClassification") else TOGETHER
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for group in by_length.values():
        for start in range(0, len(group), together):
            ids = torch.tensor(group[start : start + together])
            yield Batch(ids, _answer(ids, name, config))


def _answer(ids: Tensor, name: str, config: Any) -> Tensor | None:
    """The start of what a decoder says; None where there is no decoder to ask."""
    if not getattr(config, "is_encoder_decoder", False) or name.endswith((*ENCODERS, "EncoderModel")):
        return None
    keys = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    start = next((found for key in keys if isinstance(found := getattr(config, key, None), int)), 0)
    return torch.full((len(ids), 1), start)
