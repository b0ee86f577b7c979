"""What an adapter says about one weight, whatever file it came from.

`W` is the weight as torch's Linear has it, (out, in); convolutions are flattened to (out, in·k…). The tensors named
here are headers (`Stored`); nothing is read until a plan is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .stored import Stored


@dataclass(frozen=True)
class LowRank:
    """W' = W + s·BA (LoRA, equation 3 of arXiv:2106.09685)."""

    A: Stored  # (r, in, …)
    B: Stored  # (out, r, …)
    scale: float  # s
    transposed: bool | None = None
    """Whether W is stored as (in, out): True for embeddings, False for convolutions, None where only the base can
    tell (torch's Linear or GPT-2's Conv1D)."""

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.A.shape[0]


@dataclass(frozen=True)
class Decomposed:
    """W' = m·V/‖V‖ with V = W + s·BA, one norm per output row (DoRA, equation 5 of arXiv:2402.09353)."""

    inner: LowRank
    m: Stored  # out elements, of any shape


@dataclass(frozen=True)
class Full:
    """W' = value: a module saved whole."""

    value: Stored


Update = LowRank | Decomposed | Full


def tensors_of(update: Update) -> Iterator[Stored]:
    """The adapter tensors an update is made of."""
    match update:
        case LowRank(A, B):
            yield from (A, B)
        case Decomposed(inner, m):
            yield from (inner.A, inner.B, m)
        case Full(value):
            yield value


def low_rank(update: LowRank | Decomposed) -> LowRank:
    """The low-rank part of an update."""
    return update.inner if isinstance(update, Decomposed) else update
