"""Hold the kinds of update that rotate W: OFT, BOFT and HRA, as PEFT and LyCORIS store them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..storage.safetensors import StoredTensor
from . import Transform


@dataclass(frozen=True)
class Rotated(Transform):
    """W' = WR, or RW on the side of the outputs: R is orthogonal, and made of small blocks or reflections.

    Rules, with the shape of `blocks`:

        oft        (n, b(b−1)/2)  inputs   PEFT's OFT: R = diag of Cayley transforms, `terms` of their series
        boft       (m, n, b, b)   inputs   PEFT's BOFT: m butterfly stages of exact Cayley transforms
        hra        (in, r)        inputs   Householder reflections; `terms` 1 orthogonalises them first
        diag-oft   (n, b, b)      outputs  LyCORIS' diag-OFT
        butterfly  (m, n, b, b)   outputs  LyCORIS' BOFT
    """

    blocks: StoredTensor
    rule: str
    depends: ClassVar[bool] = True
    terms: int = 0
    """The terms of the Cayley–Neumann series; 0 for the exact Cayley transform."""
    limit: float = 0.0
    """The largest norm of a block's generator, if training limited it (constrained OFT)."""
    embedding: bool = False
    """True if PEFT's R turns rows of an embedding from the right as it is; of other weights, its transpose does."""
    shared: bool = False
    """True if one block serves everywhere."""

    @property
    def on_outputs(self) -> bool:
        """True if R mixes outputs."""
        return self.rule in ("diag-oft", "butterfly")

    @property
    def width(self) -> int | None:
        """The number of inputs, or outputs, that R mixes; None if one block serves everywhere."""
        if self.shared:
            return None
        count = {"hra": 1, "oft": self.blocks.shape[0]}.get(self.rule, self.blocks.shape[-3:][0])
        return count * self.size

    @property
    def size(self) -> int:
        """The inputs, or outputs, of one block."""
        if self.rule == "oft":
            return (1 + math.isqrt(1 + 8 * self.blocks.shape[1])) // 2
        return self.blocks.shape[-1] if self.rule != "hra" else self.blocks.shape[0]

    @property
    def outputs(self) -> int | None:
        """The outputs that R mixes."""
        return self.width if self.on_outputs else None

    @property
    def inputs(self) -> tuple[int, ...] | None:
        """The inputs that R mixes, as one dimension."""
        return None if self.on_outputs or self.width is None else (self.width,)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The blocks alone."""
        return (self.blocks,)

    @property
    def title(self) -> str:
        """The rule and its numbers."""
        names = {"oft": "OFT", "boft": "BOFT", "hra": "HRA", "diag-oft": "diag-OFT", "butterfly": "BOFT"}
        return f"{names[self.rule]}, blocks of {self.size}"
