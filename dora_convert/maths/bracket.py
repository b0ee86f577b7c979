"""Find which magnitudes are the k largest from approximate ones, of which few are near enough to be in doubt.

A sample bounds the k-th largest. A pass over all approximate magnitudes counts those above the bounds, and holds those
inside. Only the held ones within the error of the k-th have to be computed exactly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SIGMAS = 3.2
"""The distance of bounds from the sample's k-th largest, in standard errors, if nothing else is asked for."""
ROUGH = 1 << 12


class Near(NamedTuple):
    """Elements whose approximate magnitudes do not tell on which side of the k-th largest they are."""

    places: Tensor  # int64
    weights: Tensor  # what was held with each
    rank: int
    """So many of them are among the k largest."""
    middle: float
    """The k-th largest approximate magnitude."""
    error: float
    """Magnitudes may be off by so much."""


class Bracket:
    """Bounds of the k-th largest of n magnitudes, and the numbers inside them, with their places and weights."""

    def __init__(self, k: int, n: int) -> None:
        self.k, self.n = k, n
        self._low = self._high = 0.0
        self._above = 0
        self.missed = False
        """True if the k-th largest was not well inside the bounds."""
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []

    def choose(self, sample: Tensor, sigmas: float = SIGMAS) -> bool:
        """Choose the bounds by a sample of magnitudes from everywhere; return False if they are no bounds."""
        self._above, self.missed = 0, False
        share, count = self.k / self.n, len(sample)
        half = sigmas * math.sqrt(share * (1 - share) * count) + 1
        first, last = math.floor(share * count - half), math.ceil(share * count + half)
        if not count or first >= count or last <= 1:
            return False
        high, low = _ranked(sample, max(1, first), min(last, count))
        self._high, self._low = math.inf if first < 1 else high, 0.0 if last > count else low
        return self._low < self._high

    @property
    def bounds(self) -> list[float]:
        """The bounds: magnitudes between them are held, and those that reach the upper one are counted."""
        return [self._low, self._high]

    def take(
        self,
        sizes: Tensor,  # between the bounds
        places: Tensor,  # int64
        weights: Tensor,  # what to hold with each
        above: int,
    ) -> None:
        """Take what a block holds."""
        self._found.append((sizes, places, weights))
        self._above += above

    def near(self, share: float, spread: float) -> Near | None:
        """Return the elements in doubt, if a magnitude x is off by `share`·(x + `spread`) at most.

        None if the bounds were wrong.
        """
        sizes, places, weights = (torch.cat(parts) for parts in zip(*self._found, strict=True))
        self._found.clear()
        rank = self.k - self._above
        self.missed = True
        if not 1 <= rank <= len(sizes):
            return None
        kth = float(sizes.kthvalue(len(sizes) + 1 - rank).values)
        error = share * (kth + spread)
        low, high = kth - 3 * error, kth + 3 * error
        if not self._low <= low <= high <= self._high:
            return None
        self.missed = False
        larger = int(torch.count_nonzero(sizes > high))
        doubtful = (sizes >= low) & (sizes <= high)
        return Near(places[doubtful], weights[doubtful], rank - larger, kth, error)


def parting(
    magnitudes: Tensor,  # those in doubt, nearly exact
    rank: int,
    error: float,  # all others are farther away than this
    rest: float,  # the error that is left
) -> float | None:
    """Return a number that parts the `rank` largest from all others; None if two are too close to each other."""
    ordered = magnitudes.sort(descending=True).values
    if not 1 <= rank <= len(ordered):
        return None
    least = float(ordered[rank - 1])
    gap = min(error, least - float(ordered[rank])) if rank < len(ordered) else error
    return least - gap / 2 if gap > 4 * rest and gap < least else None


def _ranked(sample: Tensor, first: int, last: int) -> tuple[float, float]:
    """Return the numbers of two ranks, 1 for the largest; a part of the sample tells about where they are."""
    part, count = sample[:: max(1, len(sample) // ROUGH)], len(sample)
    spare = SIGMAS * 0.5 / math.sqrt(len(part)) + 2 / len(part)
    high = _at(part, first / count - spare) if first > spare * count else math.inf
    low = _at(part, last / count + spare) if last / count + spare < 1 else 0.0
    chosen = torch.empty_like(sample)
    torch.ops.aten.hardtanh_backward.grad_input(sample, sample, low, high, grad_input=chosen)
    inside, larger = chosen[chosen.nonzero().squeeze(1)], int(sample.ge(high).sum())
    if not larger < first <= last <= larger + len(inside):
        inside, larger = sample, 0
    numbers = (inside.kthvalue(len(inside) + 1 - rank + larger).values for rank in (first, last))
    return float(next(numbers)), float(next(numbers))


def _at(sample: Tensor, share: float) -> float:
    """Return a number that about a share of a sample exceeds."""
    rank = min(max(1, round(share * len(sample))), len(sample))
    return float(sample.kthvalue(len(sample) + 1 - rank).values)
