"""Where an update lands: a stored tensor, and which way round it lies there."""

from __future__ import annotations

from dataclasses import dataclass

from .stored import Stored


@dataclass(frozen=True)
class Slot:
    """A stored weight; `transposed` when it lies there as (in, out), as in embeddings and GPT-2's Conv1D."""

    tensor: Stored
    transposed: bool = False
