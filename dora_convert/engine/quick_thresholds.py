"""Find the thresholds of low-rank changes by approximate changes in float32, and settle the doubtful ones in float64.

A change is g·W + s·f·BA with f = m/‖V‖ and g = f − 1, which float32 holds to a few parts in a million. The exact norms
come first, in a pass that also takes a sample. The second pass counts. The last pass of a merge needs no order but that
of magnitudes on each side of a threshold, so a number between two magnitudes is as good as the k-th largest itself.
Searches that fail, as where many magnitudes are equal, are left to the exact way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..maths.block_steps import count_block, norms_of_block, sample_of_block
from ..maths.bracket import Bracket, parting
from ..maths.in_single import SINGLE
from ..option_table import COLLECTED, held_elements, sample_size
from ..plan.item import Item
from .changes import GOLDEN, hold_factors, refuse_infinite
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit
from .quick_changes import QuickChange, groups_of, holds_base, tile
from .tensor import SourceValues

DOUBLE = 2.0**-53
CANCELLED = 2.0**-10
"""Squares of norms below this part of ‖W‖² have lost digits."""
ATTEMPTS = 3.2, 8.0
"""Distances of bounds from a sample's k-th largest, in standard errors: a few searches in a hundred need the second."""


def fits(numel: int) -> bool:
    """Return True if a search is likely to hold few enough elements."""
    return held_elements(numel) <= COLLECTED


class QuickThresholds:
    """Finds the thresholds of some edits in two passes."""

    def __init__(self, item: Item, values: SourceValues, buffers: DeviceBuffers) -> None:
        self._item, self._values, self._buffers = item, values, buffers
        self._spans, self._step = list(item.spans()), _step(item)

    def find(self, operands: dict[int, tuple[LoadedEdit, int]]) -> dict[int, QuickChange]:
        """Return each edit's change whose `cut` is found: it parts the k largest magnitudes from the others.

        `operands` are edits and their k, by the edit's number.
        """
        numel = self._item.source.numel
        searches = {number: QuickChange(operand, Bracket(k, numel)) for number, (operand, k) in operands.items()}
        self._measure(list(searches.values()))
        for each in searches.values():
            each.operand.known = each.norms if each.divides_rows else None
        done: dict[int, QuickChange] = {}
        for sigmas in ATTEMPTS:
            chosen = {k: each for k, each in searches.items() if each.bracket.choose(torch.cat(each.sample), sigmas)}
            self._count(list(chosen.values()))
            done |= {number: each for number, each in chosen.items() if self._settle(each)}
            searches = {number: each for number, each in chosen.items() if each.bracket.missed}
        for each in done.values():
            each.sample.clear()
        return done

    def _measure(self, searches: Sequence[QuickChange]) -> None:
        """Compute the norms of rows, and take samples of the changes."""
        dividing = [each for each in searches if each.divides_rows]
        gram, scales = _Gram(dividing), [each.scale for each in searches]
        for number, span in enumerate(self._spans):
            hold_factors([each.operand for each in searches], *span)
            W = self._base(searches, *span)
            if dividing:
                self._keep_norms(gram, W, span)
            first, factors = int(number * GOLDEN % 1 * self._step), [each.part(*span).factors for each in searches]
            found = sample_of_block(W, factors, scales, first=first, step=self._step)
            for each, sample in zip(searches, found, strict=True):
                each.sample.append(sample)
        for each in dividing:
            refuse_infinite(each.operand, self._item, each.norms)

    def _keep_norms(self, gram: _Gram, W: Tensor, span: tuple[int, int]) -> None:
        """Keep the norms of a block's rows."""
        found, sure = gram.norms(W, span, self._buffers.scratch("tile", tile(W.shape), torch.float64))
        for each, n, kept in zip(gram.searches, found, sure, strict=True):
            part = each.norms[slice(*span)]  # those that nearly cancel have lost digits
            part.copy_(n if kept else each.operand.norms_of_rows(self._block(gram.searches, *span).clone(), *span))

    def _count(self, searches: Sequence[QuickChange]) -> None:
        """Count the changes above each interval, and hold those inside."""
        for span in self._spans if searches else ():
            hold_factors([each.operand for each in searches], *span)
            W = self._base(searches, *span)
            scratch = self._scratch("strips", (2, *tile(W.shape)))
            chosen, marks = self._scratch("chosen", W.shape), self._buffers.scratch("marks", W.shape, torch.bool)
            for each in searches:
                first, single = each.single(*span, self._item.matrix[0])
                sizes, places, weights, above = count_block(
                    W,
                    single.factors(span[0] - first, span[1] - first),
                    each.bracket.bounds,
                    scratch=scratch,
                    chosen=chosen,
                    marks=marks,
                    groups=groups_of(marks),
                )
                each.bracket.take(sizes, places.add_(span[0] * W.shape[1]), weights, above)

    def _base(self, searches: Sequence[QuickChange], start: int, stop: int) -> Tensor:
        """Return a block of W as it is stored, if these are its values; zeros if no change needs W."""
        if holds_base(self._item) and any(each.operand.edit.depends for each in searches):
            return self._buffers.raw(self._item.source, start, stop)
        W = self._block(searches, start, stop)
        return W if any(each.operand.edit.depends for each in searches) else W.zero_()

    def _block(self, searches: Sequence[QuickChange], start: int, stop: int) -> Tensor:
        """Return a block of W; of any values if no change needs W."""
        if any(each.operand.edit.depends for each in searches):
            return self._values.block(self._buffers.raw(self._item.source, start, stop), start, stop)
        return self._buffers.scratch("work", (stop - start, self._item.matrix[1]), torch.float64)

    def _scratch(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._buffers.scratch(name, shape, torch.float32)

    def _settle(self, change: QuickChange) -> bool:
        """Find the number that parts the k largest magnitudes from the others; return False if it is none of these."""
        share, spread = change.errors
        if not math.isfinite(spread) or (near := change.bracket.near(share, spread)) is None:
            return False
        W = near.weights.double()
        exact = change.exact(near.places, W, self._spans, self._item.matrix[1])
        rest = share * DOUBLE / SINGLE * (spread + float((W.abs() + exact.abs_()).max()))
        if (cut := parting(exact, near.rank, near.error, rest)) is None:
            return False
        change.cut, change.middle, change.near = cut, near.middle, tuple(near.places.sort().values.tolist())
        return True


class _Gram:
    """Computes norms of V = W + s·BA from W·Aᵀ, for all edits at once."""

    def __init__(self, searches: Sequence[QuickChange]) -> None:
        self.searches = searches
        self._ratios = [each.scale * each.operand.edit.norm_ratio for each in searches]
        self._rights: list[Tensor] = []
        self._stacked = torch.empty(0)
        self._squares: list[Tensor] = []

    def norms(self, W: Tensor, span: tuple[int, int], scratch: Tensor) -> tuple[list[Tensor], list[bool]]:
        """Return the norms of a block's rows for each edit, and where they are all exact."""
        factors = [each.factors(*span) for each in self.searches]
        self._keep([right for _, right in factors])
        return norms_of_block(
            W,
            self._stacked,
            self._squares,
            [left for left, _ in factors],
            ratios=self._ratios,
            scratch=scratch,
            cancelled=CANCELLED,
        )

    def _keep(self, rights: list[Tensor]) -> None:
        """Stack the right factors, if they are not those of the block before."""
        if [id(right) for right in rights] != [id(right) for right in self._rights]:
            self._rights, self._stacked = rights, torch.cat(rights)
            self._squares = [right @ right.T for right in rights]


def _step(item: Item) -> int:
    """Return the distance of the columns that a sample has of each block."""
    return max(1, min(item.source.numel // sample_size(item.source.numel), item.matrix[1]))
