"""Run a model on batches of token ids, in float32, and keep its outputs on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.precision import as_bytes, empty
from ..errors import OutputError, UnsupportedError

CONTINUATION = 8
"""Tokens that a generating model adds to each prompt, greedily."""
PLURAL = ("start_logits", "end_logits")


def not_compared(why: str) -> UnsupportedError:
    """Return the error that says why the outputs of a model are not compared."""
    return UnsupportedError(why, hint="verify --level weights needs no model code")


@dataclass
class Batch:
    """Prompts of one length, and their continuations."""

    ids: Tensor
    """(prompts, tokens)"""
    answer: Tensor | None = None
    """Input of a decoder, beginning with its start token; None for models without a decoder of their own."""

    @property
    def tokens(self) -> Tensor:
        """The ids that a generating model continues."""
        return self.ids if self.answer is None else self.answer


@dataclass(frozen=True)
class ModelRunner:
    """A loaded model on its device."""

    model: Any
    device: torch.device
    generates: bool
    on_pass: Callable[[], None] = lambda: None
    """Called after each pass over a batch."""

    @torch.inference_mode()
    def outputs(self, batch: Batch) -> Tensor:
        """Return logits or hidden states as (prompts, positions, classes), in float32 on the CPU.

        Raises UnsupportedError if the model needs more than token ids.
        """
        inputs = {"input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids)}
        if batch.answer is not None:
            inputs["decoder_input_ids"] = batch.answer
        try:
            result = self.model(**{name: ids.to(self.device) for name, ids in inputs.items()})
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, NotImplementedError) as error:
            why = f"{type(error).__name__}: {error}"
            raise not_compared(f"The model cannot be run on tokens alone ({why}).") from error
        self.on_pass()
        return _main_output(result).float().cpu()

    def extend(self, batch: Batch) -> Batch:
        """Return the batch with the likeliest continuation, if the model generates."""
        for _ in range(CONTINUATION if self.generates else 0):
            following = self.outputs(batch)[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([batch.tokens, following], dim=1)
            batch = Batch(tokens) if batch.answer is None else Batch(batch.ids, tokens)
        return batch


def _main_output(result: Any) -> Tensor:
    """Return the output to compare, as (prompts, positions, classes)."""
    if PLURAL[0] in result:
        return torch.stack([result[name] for name in PLURAL], dim=1)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if isinstance(output := result.get(name), Tensor) and output.ndim > 1:
            return output if output.ndim > 2 else output[:, None]
    raise not_compared(f"The model's outputs ({', '.join(result)}) are neither logits nor hidden states.")


def continues_alike(batch: Batch, logits: Tensor) -> int:
    """Return the number of prompts of an extended batch that a model continues with the same tokens.

    `logits` are the model's outputs for the extended batch: its choices follow from one pass over all tokens.
    """
    return int((chosen(logits) == batch.tokens[:, -CONTINUATION:]).all(dim=1).sum())


def chosen(logits: Tensor) -> Tensor:
    """Return the tokens that a model chooses after those of an extended batch: (prompts, tokens)."""
    return logits[:, -CONTINUATION - 1 : -1].argmax(-1)


class OutputFiles:
    """float32 outputs by name, in files of a folder; raises OutputError if the folder cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {}
        folder.mkdir()

    def __setitem__(self, name: str, value: Tensor) -> None:
        value = value.float().contiguous()
        self._shapes[name] = tuple(value.shape)
        try:
            (self._folder / name).write_bytes(as_bytes(value))
        except OSError as error:
            raise OutputError(
                f"{self._folder} cannot be written: {error.strerror or error}.",
                hint="TMPDIR=FOLDER names another place for the outputs of models",
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        value = empty(self._shapes[name], torch.float32)
        with (self._folder / name).open("rb") as file:
            file.readinto(as_bytes(value))
        return value
