"""A model's outputs for token ids: one pass at a time, in float32, and the tokens it would continue with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError

CONTINUATION = 8
"""Tokens that a generating model adds to each prompt, greedily."""
PLURAL = ("start_logits", "end_logits")


@dataclass
class Batch:
    """Prompts of one length, and what is said after them."""

    ids: Tensor
    """(prompts, tokens)"""
    answer: Tensor | None = None
    """What a decoder is given, beginning with its start token; None where there is no decoder of its own."""

    @property
    def tokens(self) -> Tensor:
        """The ids whose next token a generating model tells."""
        return self.ids if self.answer is None else self.answer


@dataclass(frozen=True)
class Runner:
    """A model that is ready to run, and what it is."""

    model: Any
    device: torch.device
    generates: bool

    @torch.inference_mode()
    def outputs(self, batch: Batch) -> Tensor:
        """Logits, or hidden states where a model has none: (prompts, positions, classes) in float32 on the CPU.

        Raises UnsupportedError where the model cannot be asked with token ids alone.
        """
        given = {"input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids)}
        if batch.answer is not None:
            given["decoder_input_ids"] = batch.answer
        try:
            result = self.model(**{name: ids.to(self.device) for name, ids in given.items()})
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, NotImplementedError) as error:
            raise UnsupportedError(
                f"The model cannot be asked with tokens alone ({type(error).__name__}: {error}).",
                hint="verify --level weights needs no model code",
            ) from error
        return _flat(result).float().cpu()

    def extend(self, batch: Batch) -> Batch:
        """The batch with the tokens that a generating model adds, always the likeliest one."""
        for _ in range(CONTINUATION if self.generates else 0):
            following = self.outputs(batch)[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([batch.tokens, following], dim=1)
            batch = Batch(tokens) if batch.answer is None else Batch(batch.ids, tokens)
        return batch


def _flat(result: Any) -> Tensor:
    """The outputs to compare, as (prompts, positions, classes)."""
    if PLURAL[0] in result:
        return torch.stack([result[name] for name in PLURAL], dim=1)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if isinstance(found := result.get(name), Tensor) and found.ndim > 1:
            return found if found.ndim > 2 else found[:, None]
    raise UnsupportedError(
        f"The model's outputs ({', '.join(result)}) are neither logits nor hidden states.",
        hint="verify --level weights needs no model code",
    )


def continues_alike(batch: Batch, logits: Tensor) -> int:
    """How many prompts of an extended batch a model would continue with the same tokens.

    Each token was the likeliest after those before it; the other model's choices follow from one pass over all of them.
    """
    chosen = logits[:, -CONTINUATION - 1 : -1].argmax(-1)
    return int((chosen == batch.tokens[:, -CONTINUATION:]).all(dim=1).sum())
