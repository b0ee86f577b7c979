"""Combine pruned low-rank changes in float32, and the elements that float32 does not decide in float64.

The thresholds are known (engine/quick_thresholds.py), and the elements that are near to one. Of all others float32
tells which are kept. It decides the rounded result of nearly all elements, too: errors are bounded. So the bytes are
those of float64.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..maths import in_single, lora
from ..maths.in_single import SINGLE
from ..plan.item import Item
from .changes import hold_factors
from .device_buffers import DeviceBuffers
from .quick_changes import SLACK, QuickChange, SinglePart, groups_of, holds_base, tile

UNDERFLOW = 2.0**-110
"""More than all steps for one element lose below float32's normal numbers."""
LEAST_CUT = 2.0**-80
"""Float32 has no relative precision for much smaller changes."""
MOST_CHANGES = 255
"""So many are counted in a byte."""
MOST_DOUBTFUL = 1 / 32
"""If more elements of a block are in doubt, float64 is as quick."""


def suits(item: Item, changes: Sequence[QuickChange]) -> bool:
    """Return True if float32 holds the base's numbers, is far finer than the output's dtype, and tells signs."""
    plain = holds_base(item) and item.dtype == "BF16" and not (item.parts or item.replaced)
    certain = all(each.middle > max(LEAST_CUT, 8 * _error(each)) for each in changes)
    return plain and certain and len(changes) == len(item.edits) <= MOST_CHANGES


def _error(change: QuickChange) -> float:
    share, spread = change.errors
    return share * (change.middle + spread)


class _Bounds(NamedTuple):
    """Bounds of the errors in some rows; those of a block depend on its largest |W|, too."""

    parts: Sequence[SinglePart]
    first: int
    """The number of the first row."""
    share: float
    added: Tensor  # (rows, 1), float64
    steep: float
    """So much is added for each 1 of the largest |W|."""
    vote: tuple[float, float]
    """The vote's error for each 1 of the largest |W|, and so much more."""


class QuickCombiner:
    """Combines blocks of one item."""

    def __init__(self, item: Item, changes: Sequence[QuickChange], buffers: DeviceBuffers) -> None:
        assert item.combination
        self._item, self._changes, self._scratch = item, changes, buffers.scratch
        how = item.combination
        weights = [edit.weight for edit in item.edits]
        self._rule = in_single.CombineRule(weights, how.majority_sign if how.elects else "")
        self._bounds = _Bounds((), 0, 0.0, added=torch.empty(0), steep=0.0, vote=(0.0, 0.0))
        self.helps = True
        """False once too many elements of a block were in doubt."""

    def rounded(self, raw: Tensor, start: int, stop: int) -> Tensor | None:
        """Return a block's result, rounded; None if it must be computed otherwise. `raw` are the base's rows."""
        if not self.helps:
            return None
        hold_factors([each.operand for each in self._changes], start, stop)
        singles = [each.single(start, stop, self._item.matrix[0]) for each in self._changes]
        if (errors := self._errors(singles, raw, start)) is None:
            return None
        out, marks = self._scratch("rounded", raw.shape, torch.bfloat16), self._scratch("marks", raw.shape, torch.bool)
        factors = [part.factors(start - first, stop - first) for first, part in singles]
        self._combine(raw, factors, errors, out, marks)
        places, exact = self._exact(raw, marks, start, stop)
        self.helps = len(places) <= MOST_DOUBTFUL * raw.numel()
        out.view(-1).index_copy_(0, places, lora.round_to(exact, torch.empty_like(exact, dtype=torch.bfloat16)))
        for each in self._changes:
            if each.divides_rows:
                each.operand.n.append(each.norms[start:stop])
        return out

    def _combine(
        self, raw: Tensor, changes: list[list[Tensor]], errors: in_single.Errors, out: Tensor, marks: Tensor
    ) -> None:
        """Combine a block in float32; mark the doubtful elements."""
        few = tile(raw.shape)
        agrees = self._scratch("agrees", (1 + len(changes), *few), torch.bool)
        lower = self._scratch("lower", few, torch.bfloat16)
        in_single.combine_block(
            raw,
            changes,
            cuts=[each.middle for each in self._changes],
            weights=self._rule.weights,
            majority=self._rule.majority,
            errors=[errors.share, errors.vote],
            added=errors.added,
            scratch=self._scratch("strips", (4 + len(changes), *few), torch.float32),
            agrees=agrees[:-1],
            counts=agrees.view(torch.uint8),
            lower=[lower, lower.view(torch.int16)],
            out=[out, out.view(torch.int16)],
            marks=marks,
        )

    def _errors(self, singles: Sequence[tuple[int, SinglePart]], raw: Tensor, start: int) -> in_single.Errors | None:
        """Return bounds of the errors in a block; None if there are none."""
        if [id(part) for _, part in singles] != [id(part) for part in self._bounds.parts]:
            self._bounds = self._bound(singles)
        bounds, largest = self._bounds, max(abs(float(end)) for end in torch.aminmax(raw))
        vote = bounds.vote[0] * largest + bounds.vote[1]
        if not (math.isfinite(vote) and math.isfinite(bounds.share)):
            return None
        rows = bounds.added[start - bounds.first : start - bounds.first + len(raw)]
        return in_single.Errors(bounds.share, (rows + bounds.steep * largest).float(), vote)

    def _bound(self, singles: Sequence[tuple[int, SinglePart]]) -> _Bounds:
        """Return bounds of the errors for the rows that all parts have.

        A change is off by a share τ of |g·W| and the product's terms together, as in QuickChange.errors. A mean is off
        by no more than the worst of its terms, a sum by no more than all of them. Adding rounds some times more.
        """
        parts, first = [part for _, part in singles], max(first for first, _ in singles)
        height = min(number + len(part.left) for number, part in singles) - first
        worst = 1.01 * max(each.errors[0] + (len(parts) + SLACK) * SINGLE for each in self._changes)
        weights = [abs(weight) for weight in self._rule.weights]
        g = [weight * part.largest for weight, part in zip(weights, parts, strict=True)]
        products = torch.stack(
            [
                weight * part.product[first - number : first - number + height]
                for weight, (number, part) in zip(weights, singles, strict=True)
            ]
        )
        G, P = (max(g), products.amax(0)) if self._rule.majority else (sum(g), products.sum(0))
        vote = worst * sum(part.largest for part in parts), worst * sum(float(part.product.max()) for part in parts)
        share, steep = 6 * SINGLE, worst * G
        if G < 1 / 2:  # with the result x, |W| ≤ |x| + G·|W| + P, so G·|W| + P ≤ (G·|x| + P)/(1 − G)
            share, P, steep = share + worst * G / (1 - G), P / (1 - G), 0.0
        finite = lora.all_finite(P) and math.isfinite(G)
        added = (worst * P).add_(UNDERFLOW)
        return _Bounds(
            parts, first, share if finite else math.inf, added=added, steep=steep, vote=(vote[0], vote[1] + UNDERFLOW)
        )

    def _near(self, first: int, last: int) -> Tensor:
        """Return the places in a block of elements that are near to a threshold."""
        found: set[int] = set()
        for each in self._changes:
            found.update(each.near[bisect_left(each.near, first) : bisect_left(each.near, last)])
        return torch.tensor([place - first for place in found], dtype=torch.int64)

    def _exact(self, raw: Tensor, marks: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the places of the doubtful elements, and their results by the definition in float64."""
        return in_single.exact_elements(
            raw,
            marks,
            groups_of(marks),
            self._near(start * raw.shape[1], stop * raw.shape[1]),
            [each.elements(start, stop) for each in self._changes],
            scales=[each.scale for each in self._changes],
            cuts=[math.nextafter(each.cut, 0.0) for each in self._changes],
            weights=self._rule.weights,
            majority=self._rule.majority,
        )
