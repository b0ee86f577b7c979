"""Find the least magnitude that pruning keeps, by other means than the engine's.

A histogram of logarithms tells the bin of the threshold; the numbers of this bin are then counted one by one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

OCTAVE, OCTAVES = 1 << 10, 96
"""Bins for each power of two, and the powers of two below the largest number; zeros lie lower."""

Cut = tuple[float, int]
"""The least magnitude that is kept, and the flat place of the last kept element that equals it; −1 for all."""
Magnitudes = Callable[[bool], Iterator[tuple[int, Tensor]]]
"""Yields the flat place and the magnitudes of each part of a tensor; called with True, only of those that count."""


def find_cut(magnitudes: Magnitudes, wanted: int) -> Cut:
    """Return the wanted largest magnitude, and the place of its last kept equal: the first ones are kept."""
    if wanted == 0:
        return sys.float_info.max, -1
    largest = max(float(piece.max()) for _, piece in magnitudes(True))
    counts = torch.zeros(OCTAVE * OCTAVES + 1, dtype=torch.int64)
    for _, piece in magnitudes(True):
        bins = _bin_of(piece, largest)
        counts.scatter_add_(0, bins, torch.ones_like(bins))
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top >= wanted).nonzero()[0])
    if (chosen := len(counts) - 1 - place) == 0:
        return 0.0, -1  # all but zeros are kept
    left = wanted - (int(from_top[place - 1]) if place else 0)
    found: dict[float, int] = {}
    for _, piece in magnitudes(True):
        for value in piece[_bin_of(piece, largest) == chosen].tolist():
            found[value] = found.get(value, 0) + 1
    for value in sorted(found, reverse=True):
        if left <= found[value]:
            return value, -1 if left == found[value] else _last_equal(magnitudes, value, left)
        left -= found[value]
    raise AssertionError("a bin holds fewer numbers than were counted")


def _last_equal(magnitudes: Magnitudes, value: float, wanted: int) -> int:
    """Return the flat place of the last element of this magnitude that is kept."""
    for first, piece in magnitudes(False):
        places = (piece == value).nonzero().flatten()
        if wanted <= len(places):
            return first + int(places[wanted - 1])
        wanted -= len(places)
    raise AssertionError("fewer equal numbers than were counted")


def _bin_of(magnitudes: Tensor, largest: float) -> Tensor:
    """Return the bin of each magnitude: equal steps of the logarithm; 0 for those far below the largest."""
    steps = ((magnitudes / largest).log2() * OCTAVE).nan_to_num(-math.inf, neginf=-math.inf)
    return (steps.clamp(min=-OCTAVE * OCTAVES).floor() + OCTAVE * OCTAVES).long()
