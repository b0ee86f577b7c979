"""Turn prompts into token ids with a model's tokenizer, or make up token ids without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..deferred_imports import seeded
from ..errors import UnsupportedError
from .forward import CONTINUATION, Batch, not_compared
from .prompts import BUILT_IN, LENGTH, LONGEST

TOGETHER = 8
"""Prompts that a model runs at once."""
ENCODERS = ("ForSequenceClassification", "ForQuestionAnswering")
"""Encoder-decoder models that make the decoder's inputs themselves."""


@dataclass(frozen=True)
class Samples:
    """The sample prompts, in batches of one length."""

    batches: tuple[Batch, ...]
    notes: tuple[str, ...]
    decode: Callable[[list[int]], str] | None = None
    """The tokenizer's way back to text; None for made-up token ids."""

    @property
    def count(self) -> int:
        """Number of prompts."""
        return sum(len(batch.ids) for batch in self.batches)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its continuation."""
        return max(batch.ids.shape[1] for batch in self.batches) + CONTINUATION + 1

    @property
    def tokens(self) -> int:
        """Most tokens that a model runs at once."""
        return max(len(batch.ids) * (batch.ids.shape[1] + CONTINUATION + 1) for batch in self.batches)


def make_samples(
    texts: Sequence[str], folders: Sequence[Path], name: str, config: Any, size: int | None = None
) -> Samples:
    """Return token ids of a caller's prompts, or of the built-in prompts without `texts`.

    The first tokenizer in `folders` is used. `name` is the model's class, such as LlamaForCausalLM. `size` is
    the number of tokens in the trained model's vocabulary, if that is not the config's.

    Raises UnsupportedError if a caller's text cannot be turned into token ids.
    """
    size = size or vocabulary(config)
    tokenizer = next(filter(None, map(_tokenizer, folders)), None)
    most = _most_tokens(config)
    notes = []
    if tokenizer is not None:
        limit = min(LONGEST if texts else LENGTH, most)
        encoded = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in texts or BUILT_IN]
        rows = [[int(token) for token in row] for row in encoded]
        if texts and any(len(row) == limit for row in rows):
            notes.append(f"prompts are cut at {limit} tokens")
    elif texts:
        raise UnsupportedError(
            "No tokenizer for the prompts found in BASE or ADAPTER.",
            hint="without --prompt and --prompts, token ids are made up",
        )
    else:
        rows = _made_up_ids(size, min(LENGTH, most), config)
        notes.append(f"no tokenizer; {len(rows)} prompts of made-up token ids")
    rows = [row for row in rows if row]
    if not rows or max(map(max, rows)) >= size:
        raise UnsupportedError("The tokenizer does not match the model's vocabulary.", hint="verify --level weights")
    return Samples(tuple(_batched(rows, name, config)), tuple(notes), tokenizer and tokenizer.decode)


def vocabulary(config: Any) -> int:
    """Return the number of tokens in a model's vocabulary.

    Raises UnsupportedError for models without a vocabulary.
    """
    if not isinstance(size := getattr(_text_config(config), "vocab_size", None), int):
        raise not_compared("The model does not take text.")
    return size


def _text_config(config: Any) -> Any:
    """Return the part of a config for text, or the config itself if there is not exactly one part."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return config


def _most_tokens(config: Any) -> int:
    """Return the most tokens of a prompt: its continuation and some reserved positions must fit."""
    positions = getattr(_text_config(config), "max_position_embeddings", None) or LONGEST * 2
    return max(1, min(LONGEST, positions - CONTINUATION - 4))


def _tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a folder; None if it does not exist or cannot be loaded."""
    import transformers

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return tokenizer if tokenizer("a b")["input_ids"] else None
    except Exception:  # noqa: BLE001 - made-up ids take its place
        return None


def _made_up_ids(vocabulary: int, length: int, config: Any) -> list[list[int]]:
    """Return random ids, the same each time; only an encoder-decoder's prompts end with the end token."""
    end = getattr(config, "eos_token_id", None)
    special = {getattr(config, key, None) for key in ("pad_token_id", "eos_token_id")}
    small = vocabulary < 1000
    usable = [token for token in range(vocabulary) if token not in special] if small else range(3, vocabulary)
    generator = seeded(0)
    chosen = torch.randint(len(usable), (len(BUILT_IN), length), generator=generator).tolist()
    tail = [end] if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) else []
    return [[usable[k] for k in row][: length - len(tail)] + tail for row in chosen]


def _batched(rows: Sequence[list[int]], name: str, config: Any) -> Iterator[Batch]:
    """Yield batches of prompts of one length; classifiers, which may look for padding, get one prompt."""
    together = 1 if name.endswith("ForSequenceClassification") else TOGETHER
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for group in by_length.values():
        for start in range(0, len(group), together):
            ids = torch.tensor(group[start : start + together])
            yield Batch(ids, _answer(ids, name, config))


def _answer(ids: Tensor, name: str, config: Any) -> Tensor | None:
    """Return the start token of each prompt's decoder; None for models without a decoder to run."""
    if not getattr(config, "is_encoder_decoder", False) or name.endswith((*ENCODERS, "EncoderModel")):
        return None
    keys = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    start = next((token for key in keys if isinstance(token := getattr(config, key, None), int)), 0)
    return torch.full((len(ids), 1), start)
