"""Say which stored tensors a weight of the running model is made of, and in which way.

A weight of the running model is a fixed rearrangement of stored tensors: the same tensor under another name, a
stack of experts, several tensors one below the other, or part of one tensor. Each stored tensor is a *slot* of
the weight. Sizes are headers'; no value is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Slot:
    """One stored tensor's part in a weight of the running model; by default the tensor is the whole weight.

    Outputs are rows of W as (out, in), however the weight is stored; of a bias they are its elements. Of a stack of
    experts they are one expert's.
    """

    name: str
    """The stored tensor."""
    outputs: tuple[int, int] | None = None
    """The weight's outputs that the tensor holds, from the first to before the last: for weights that are
    concatenated in memory and apart on disk. None for all."""
    part: tuple[int, int] | None = None
    """The tensor's own outputs that hold them: for weights that are apart in memory and one tensor on disk.
    Outputs of experts that lie in one tensor count on from expert to expert. None for all."""
    order: Sequence[int] | None = None
    """For each output of the slot on disk, the output of the slot in memory that it is, counted from the slot's
    first: a permutation, as of rotary embeddings. None if the order is the same."""
    expert: int | None = None
    """The number of the expert whose weight the tensor is, if the weight is a stack of experts that lie apart."""
    experts: int = 0
    """The number of experts in the stack; 0 if the weight is no stack or is stored as one."""
    transposed: bool | None = None
    """True if the tensor is stored turned: as (in, out) where the model has (out, in), or the other way round.
    None if shapes tell."""

    @property
    def is_whole(self) -> bool:
        """True if the tensor is the weight, under another name."""
        return self == Slot(self.name)


class NameMap(Protocol):
    """The names of one checkpoint's tensors in the running model, from a table of families."""

    def stored(self, target: str) -> tuple[Slot, ...] | None:
        """Return the stored tensors that a weight of the running model is made of; None if the table has no rule.

        All slots together cover the weight. Each names a tensor that the checkpoint has.
        """

    def running(self, name: str) -> str | None:
        """Return the weight of the running model that a stored tensor is part of; None if the table has no rule.

        A tensor of which several weights are made gives the first one.
        """
