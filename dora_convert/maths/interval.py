"""Bound the k-th largest of many magnitudes while they pass by, so that most are known to be above or below it.

The bounds come from the rank among the magnitudes seen so far. They may be wrong: `settle` says so at the end.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLED = 1 << 12
"""Numbers that stand for others where a bound is chosen."""
SPREAD, SIGMAS = 0.2, 2.5
"""The standard deviation of a row's share above the threshold, and the multiple of it that bounds allow for.

Rows of a DoRA differ by their magnitudes. Wider bounds cost more than the few tensors that need another pass.
"""


class Found(NamedTuple):
    """The k-th largest magnitude, the number of its equals, and those of them among the k largest."""

    value: float
    equal: int
    wanted: int


class Interval:
    """Bounds of the k-th largest of n magnitudes of a matrix with so many rows."""

    def __init__(self, k: int, n: int, rows: int) -> None:
        self.k, self._n, self._rows = k, n, rows
        self.low, self.high = 0.0, math.inf
        self.above = self._seen = 0
        """The number of magnitudes above `high`, and of all seen."""

    def guess(self, block: Tensor) -> None:
        """Choose bounds by a sample of the first block; a share of the rows stands for all."""
        sample = block.reshape(-1)[:: max(1, block.numel() // (4 * SAMPLED))].abs()
        noise = 2 * SIGMAS / math.sqrt(max(1, len(sample)))
        self._choose(sample, self.k / self._n * len(sample), (self._margin(block.numel()) + noise) * len(sample))

    def see(self, count: int, above: int) -> None:
        """Count magnitudes, of which some are above the interval."""
        self._seen += count
        self.above += above

    def narrow(self, sample: Tensor, count: int) -> None:
        """Choose narrower bounds by a sample of the `count` magnitudes inside; `above` is the caller's to count."""
        if not count:
            return
        part = len(sample) / count
        middle = self.k * self._seen / self._n - self.above
        self._choose(sample, middle * part, self._margin(self._seen) * self._seen * part)

    def _margin(self, seen: int) -> float:
        """Return the share of all magnitudes by which those seen may mislead about the rank."""
        part = max(seen, 1) / self._n
        return SIGMAS * SPREAD * math.sqrt(max(0.0, 1 / part - 1) / self._rows)

    def _choose(self, sample: Tensor, middle: float, half: float) -> None:
        """Set the bounds to the numbers of rank middle ± half of a sample, as far as it has such ranks."""
        first, last = math.floor(middle - half), math.ceil(middle + half)
        if first >= 1:
            self.high = _ranked(sample, first)
        if last <= len(sample):
            self.low = _ranked(sample, last)

    def holds(self, magnitudes: Tensor) -> Tensor:
        """Return True for those inside the bounds."""
        return (magnitudes >= self.low) & (magnitudes <= self.high)

    def settle(self, inside: Tensor) -> Found | None:
        """Return the k-th largest from all magnitudes inside; None if it is not one of them."""
        rank = self.k - self.above
        if not 0 < rank <= len(inside):
            return None
        value = inside.kthvalue(len(inside) + 1 - rank).values
        return Found(float(value), int((inside == value).sum()), rank - int((inside > value).sum()))


def _ranked(sample: Tensor, rank: int) -> float:
    """Return the number of a rank from the largest, which has rank 1."""
    return float(sample.kthvalue(len(sample) + 1 - min(max(rank, 1), len(sample))).values)


def nonzero_places(marked: Tensor) -> Tensor:
    """Return the flat places of a few marks; eight marks are looked at together."""
    flat = marked.reshape(-1)
    if len(flat) % 8:
        return flat.nonzero().squeeze(1)
    eights = flat.view(torch.int64).nonzero().squeeze(1)
    places = eights[:, None] * 8 + torch.arange(8, device=flat.device)
    return places[flat.view(-1, 8)[eights]]
