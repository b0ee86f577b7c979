"""Measure the difference between the outputs of two models, prompt after prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 16
"""Positions compared at once: float64 copies of a large vocabulary's logits stay small."""


@dataclass
class Difference:
    """Running sums over all compared outputs."""

    largest: float = 0.0
    """max |Δ| over all positions and classes."""
    total: float = 0.0
    """Σ |Δ| over all positions and classes."""
    numel: int = 0
    classes: int = 0
    """Numbers at each position."""
    positions: int = 0
    divergence: float = 0.0
    """Σ KL(reference ‖ other) over positions, in nats."""
    agreeing: int = 0
    """Positions where both outputs have the same largest value."""
    scale: float = 0.0
    """max |reference|."""

    @property
    def mean(self) -> float:
        """mean |Δ|; 0 if nothing was compared."""
        return self.total / max(1, self.numel)

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Compare two outputs of shape (..., classes)."""
        self.classes = reference.shape[-1]
        one, two = (x.reshape(-1, x.shape[-1]) for x in (reference, other))
        for start in range(0, len(one), ROWS):
            self._add(one[start : start + ROWS].double(), two[start : start + ROWS].double())

    def _add(self, one: Tensor, two: Tensor) -> None:
        # equal infinities, those of masked classes, do not differ
        delta = torch.where(one == two, 0.0, (one - two).abs()).nan_to_num(torch.inf)
        self.largest = max(self.largest, float(delta.max()))
        self.total += float(delta.sum())
        self.numel += delta.numel()
        self.positions += len(one)
        self.agreeing += int((one.argmax(-1) == two.argmax(-1)).sum())
        self.scale = max(self.scale, float(one[one.isfinite()].abs().max()) if one.isfinite().any() else 0.0)
        p, q = one.log_softmax(-1), two.log_softmax(-1)
        self.divergence += float(torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum())
