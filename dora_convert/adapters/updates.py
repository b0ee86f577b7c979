"""Describe the update of one weight by an adapter, whatever file the adapter came from.

`W` is the weight as torch's Linear has it, (out, in); convolutions are flattened to (out, in·k…). Tensors are
headers (`StoredTensor`); values are read when a plan is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from ..storage.safetensors import StoredTensor


class Start(Enum):
    """The change of the base before training: a low-rank part of W was moved or taken out."""

    PISSA = "PiSSA"  # W − top r of its SVD (arXiv:2404.02948)
    OLORA = "OLoRA"  # W − s·QR, the first r of its QR factors (arXiv:2406.01775)
    KASA = "KaSA"  # W − the last r of its SVD (arXiv:2412.06071)


@dataclass(frozen=True)
class LowRank:
    """W' = W + s·B·diag(d)·A (LoRA, equation 3 of arXiv:2106.09685, which has no d)."""

    A: StoredTensor  # (r, in, …)
    B: StoredTensor  # (out, r, …)
    scale: float  # s
    transposed: bool | None = None
    """True if W is stored as (in, out), as embeddings are; False for convolutions; None if only the base can
    tell (torch's Linear or GPT-2's Conv1D, and experts)."""
    d: StoredTensor | None = None  # r elements: AdaLoRA (arXiv:2303.10512), KaSA
    blocks: tuple[int, int] = (1, 1)
    """The numbers of blocks on the diagonals of A and B (BD-LoRA): A is then stored as (r, in/blocks), B as
    (out, r/blocks), the blocks one below the other."""
    experts: int = 0
    """The number of experts if W is (experts, …): A is stored as (experts·r, in), expert after expert; B as
    (out, r·experts), the expert varying fastest (PEFT's ParamWrapper)."""
    square: tuple[bool, bool] = (False, False)
    """True if square experts are (in, out): for models that say so of themselves, and for others."""
    start: Start | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0] // (self.experts or 1)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The shape of one row of A as a factor: (in, …)."""
        return (self.A.shape[1] * self.blocks[0], *self.A.shape[2:])

    @property
    def outputs(self) -> int:
        """The number of rows of B."""
        return self.B.shape[0]


@dataclass(frozen=True)
class Decomposed:
    """W' = m·V/‖V‖ with V = W + s·BA, one norm per output row (DoRA, equation 5 of arXiv:2402.09353)."""

    inner: LowRank
    m: StoredTensor  # out elements, of any shape


@dataclass(frozen=True)
class Delta:
    """W' = W + s·value: the bias that LoRA adds."""

    value: StoredTensor
    scale: float  # s


@dataclass(frozen=True)
class Full:
    """W' = value: a module or a bias saved whole."""

    value: StoredTensor
    may_add: bool = False
    """True if the base may lack the tensor, as with a new classifier."""
    start: Start | None = None
    """The change of the base's weight before training continued on the result."""
    copied: bool = False
    """True if the tensor is in the file for its new rows only, and training changed none of them."""


@dataclass(frozen=True)
class Rows:
    """W'[index] = value: single tokens trained."""

    value: StoredTensor  # (len(index), columns)
    index: tuple[int, ...]


Update = LowRank | Decomposed | Delta | Full | Rows


def tensors_of(update: Update) -> Iterator[StoredTensor]:
    """Yield the adapter tensors of an update."""
    match update:
        case LowRank(A, B):
            yield from (A, B)
            if update.d:
                yield update.d
        case Decomposed(inner, m):
            yield from (*tensors_of(inner), m)
        case Delta(value) | Full(value) | Rows(value):
            yield value


def low_rank(update: LowRank | Decomposed) -> LowRank:
    """Return the low-rank part of an update."""
    return update.inner if isinstance(update, Decomposed) else update
