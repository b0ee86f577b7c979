"""Bound the k-th largest of many magnitudes by a sample, so that most are known to be above or below it.

The bounds may be wrong: `settle` says so when all magnitudes have been seen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

STEP = 37
"""One of so many magnitudes is in the sample; a prime, so that rows of any length show all their columns in turn."""
SIGMAS = 3.0


class Found(NamedTuple):
    """The k-th largest magnitude, the number of its equals, and those of them among the k largest."""

    value: float
    equal: int
    wanted: int


class Interval:
    """Bounds of the k-th largest of n magnitudes."""

    def __init__(self, k: int, n: int) -> None:
        self._k, self._n = k, n
        self.low = self.high = 0.0
        self.above = 0
        """The number of magnitudes above `high`."""
        self._sample = torch.empty(0)
        self._seen = 0

    @property
    def most(self) -> int:
        """The most numbers that a sample holds, if no block is shorter than the step."""
        return 2 * self._n // STEP + 1

    def begin(self, space: Tensor) -> None:
        """Take memory for the sample."""
        self._sample = space

    def look(self, change: Tensor) -> None:
        """Take a sample of a block."""
        part = change.reshape(-1)[::STEP]
        first, self._seen = self._seen, min(self._seen + len(part), len(self._sample))
        torch.abs(part[: self._seen - first], out=self._sample[first : self._seen])

    def choose(self) -> bool:
        """Choose the bounds by the sample; return False if it is too small, or if zeros would be inside."""
        sample, self._sample = self._sample[: self._seen], torch.empty(0)
        share, count = self._k / self._n, len(sample)
        half = SIGMAS * math.sqrt(share * (1 - share) * count) + 2
        first, last = math.floor(share * count - half), math.ceil(share * count + half)
        if not 1 <= first < last <= count:
            return False
        high, low = (float(sample.kthvalue(count + 1 - rank).values) for rank in (first, last))
        self.low, self.high = low * (1 - 1e-5), high * (1 + 1e-5)  # the sample is of less precision
        return self.low > 0

    def holds(self, magnitudes: Tensor) -> Tensor:
        """Return True for those inside the bounds."""
        return (magnitudes >= self.low) & (magnitudes <= self.high)

    def settle(self, inside: Tensor) -> Found | None:
        """Return the k-th largest from all magnitudes inside; None if it is not one of them."""
        rank = self._k - self.above
        if not 0 < rank <= len(inside):
            return None
        value = inside.kthvalue(len(inside) + 1 - rank).values
        return Found(float(value), int((inside == value).sum()), rank - int((inside > value).sum()))


def nonzero_places(marked: Tensor) -> Tensor:
    """Return the flat places of a few marks; eight marks are looked at together."""
    flat = marked.reshape(-1)
    if len(flat) % 8:
        return flat.nonzero().squeeze(1)
    eights = flat.view(torch.int64).nonzero().squeeze(1)
    places = eights[:, None] * 8 + torch.arange(8, device=flat.device)
    return places[flat.view(-1, 8)[eights]]
