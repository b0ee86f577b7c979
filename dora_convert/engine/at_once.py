"""Find thresholds and combine pruned low-rank changes in one pass over a tensor, in float32.

Norms and a sample come first, as always (engine/quick_thresholds.py). The sample bounds each threshold. The pass
computes all changes in float32, combines those that are certainly kept, and rounds the results into a tensor that is
held as a whole. A few elements are set aside: those inside the bounds, and those whose result float32 does not decide.
Once the thresholds are known, these are combined again. Elements that are still in doubt are computed in float64, one
by one. So the bytes are those of float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..maths import combine as exactly
from ..maths import in_single, lora
from ..option_table import STRIP, at_once_cost, set_aside
from ..plan.item import Item
from .changes import hold_factors
from .device_buffers import DeviceBuffers
from .precision import TORCH
from .quick_thresholds import ATTEMPTS, SINGLE, SLACK, QuickThresholds, SinglePart, ThresholdSearch
from .thresholds import Thresholds

LEAST_PRODUCT = 2.0**-80
"""Products of factors are not computed here if they are smaller: float32 has no relative precision near 2⁻¹²⁶."""
UNDERFLOW = 2.0**-110
"""More than all steps for one element lose below float32's normal numbers."""
EARLIEST = 0.1
"""After this part of a tensor it is told if too much is set aside."""
MOST_CHANGES = 255
"""So many are counted in a byte."""


def combine_at_once(
    item: Item, thresholds: Thresholds, buffers: DeviceBuffers, room: int
) -> tuple[Tensor, tuple[tuple[float, int], ...]] | None:
    """Return the whole rounded result of an item, as a matrix, and its thresholds; None if it must be made otherwise.

    `room` is the memory for it, in bytes. Raises NumericalError if a norm is not finite.
    """
    if not _suits(item) or room < at_once_cost(len(item.edits), item.source.numel):
        return None
    operands = thresholds.quick_operands()
    if len(operands) < len(item.edits):
        return None
    once = _AtOnce(item, list(thresholds.quick.begin(operands).values()), thresholds.quick, buffers)
    if (cuts := once.run()) is None:
        return None
    return once.out, tuple((cut, -1) for cut in cuts)


def _suits(item: Item) -> bool:
    """Return True if float32 holds the base's numbers, and is far finer than the output's dtype: not than float16."""
    plain = not (item.source.coded or item.rows or item.start or item.parts)
    short = item.dtype == "BF16" and item.source.dtype in ("BF16", "F16", "F32")
    return plain and short and len(item.edits) <= MOST_CHANGES


class _Aside(NamedTuple):
    """Elements that are set aside."""

    places: Tensor  # int32, in ascending order
    W: Tensor  # float32
    changes: Tensor  # float32, one row for each edit; zero if they are certainly pruned


class _AtOnce:
    """The pass over one item, and what follows it."""

    def __init__(
        self, item: Item, searches: Sequence[ThresholdSearch], quick: QuickThresholds, buffers: DeviceBuffers
    ) -> None:
        assert item.combination
        self._item, self._searches, self._quick, self._buffers = item, searches, quick, buffers
        weights = [edit.weight for edit in item.edits]
        how = item.combination
        self._rule = in_single.CombineRule(weights, how.majority_sign if how.elects else "")
        self._errors = in_single.Errors(0.0, 0.0)
        """Those of the worst block."""
        self._above = torch.zeros(len(searches), dtype=torch.int64)
        self._spans = list(item.spans())
        self.out = buffers.scratch("held", item.matrix, TORCH[item.dtype])

    def run(self) -> list[float] | None:
        """Make the whole result, and return the thresholds; None if one of them must be found otherwise.

        If bounds were wrong, the pass is done again with wider ones, and narrow ones for thresholds that are known.
        """
        for sigmas in ATTEMPTS:
            known = [self._bound(each, sigmas) for each in self._searches]
            if not all(known) or (aside := self.pass_over()) is None or not self.hold(aside):
                return None
            cuts = [self._quick.settle(each) for each in self._searches]
            found = [cut for cut in cuts if cut is not None]
            if len(found) == len(cuts):
                self.finish(aside, found)
                return found
            if not all(each.bracket.missed for each, cut in zip(self._searches, cuts, strict=True) if cut is None):
                return None
        return None

    def _bound(self, search: ThresholdSearch, sigmas: float) -> bool:
        """Choose the interval of a threshold; return False if there is none."""
        if search.found is None:
            return search.bracket.choose(torch.cat(search.sample), sigmas)
        share, spread = search.errors
        search.bracket.narrow(search.found, share * (search.found + spread))
        return True

    def pass_over(self) -> _Aside | None:
        """Combine what is certain, and return the elements that are not; None if they are too many."""
        found: list[_Aside] = []
        self._above.zero_()
        count, most = 0, set_aside(len(self._searches), self._item.source.numel)
        for start, stop in self._spans:
            hold_factors([each.operand for each in self._searches], start, stop)
            raw = self._buffers.raw(self._item.source, start, stop)
            parts = [each.single(start, stop) for each in self._searches]
            errors = self._errors_of(parts, _largest(raw, self._buffers))
            if not math.isfinite(errors.added + errors.vote):
                return None
            self._errors = in_single.Errors(*map(max, self._errors, errors))
            for first, last in self._strips(start, stop):
                aside = self._strip(raw[first - start : last - start], parts, errors, first, first - start)
                found.append(aside)
                count += len(aside.places)
            if count > most * max(EARLIEST, stop / self._item.matrix[0]):
                return None
        places, W = (torch.cat([part[k] for part in found]) for k in (0, 1))
        return _Aside(places, W, torch.cat([part.changes for part in found], dim=1))

    def _strips(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        height = max(1, STRIP // self._item.matrix[1])
        return ((first, min(first + height, stop)) for first in range(start, stop, height))

    def _strip(
        self, raw: Tensor, parts: Sequence[SinglePart], errors: in_single.Errors, row: int, first: int
    ) -> _Aside:
        """Combine some rows, from row `row` of the tensor and row `first` of the block on; return what to set aside."""
        count, single = len(parts), torch.float32
        W = self._scratch("W", raw.shape, single).copy_(raw)
        both = self._scratch("deltas", (2, count, *raw.shape), single)
        for part, change in zip(parts, both[0], strict=True):
            part.change(W, change, first)
        changes, kept = both.view(2, count, -1)
        marks = self._undecided(changes)
        rounded = self.out[row : row + len(raw)].view(-1)
        doubts = in_single.combine(
            self._rule, W.view(-1), changes, errors, work=kept, out=rounded, scratch=self._scratch
        )
        places = _marked(marks.bitwise_or_(doubts))
        return _Aside((places + row * raw.shape[1]).int(), W.view(-1)[places], changes.index_select(1, places))

    def _undecided(self, changes: Tensor) -> Tensor:
        """Prune what is below each interval, count what is above it, and return marks of the elements inside."""
        count, size = changes.shape
        kept, inside = (self._scratch(name, (count, size), torch.bool) for name in ("agrees", "inside"))
        few = self._scratch("share", (size,), torch.float32)
        for change, search, marks in zip(changes, self._searches, inside, strict=True):
            low, high = search.bracket.low, search.bracket.high
            torch.ops.aten.hardshrink(change, low, out=change)
            marks.copy_(torch.ops.aten.hardtanh_backward.grad_input(change, change, -high, high, grad_input=few))
        ones = inside.view(torch.uint8)
        self._above.add_(_sums(kept.copy_(changes).view(torch.uint8))).sub_(_sums(ones))
        return torch.sum(ones, 0, dtype=torch.uint8, out=self._scratch("undecided", (size,), torch.uint8))

    def _errors_of(self, parts: Sequence[SinglePart], largest: float) -> in_single.Errors:
        """Return bounds of the errors in a block, where no weight is larger than `largest`.

        g·W and each product of the rank is rounded some times, as in ThresholdSearch.errors: of their magnitudes, which
        add up to `most` at most. A mean is off by no more than the worst of its terms, a sum by no more than all terms
        together. Weighting, adding and dividing round each term once more, and each partial sum.
        """
        added, vote, count = [0.0], 0.0, len(parts)
        for search, part in zip(self._searches, parts, strict=True):
            size, share = part.most(largest), search.errors[0]
            error = share * size + UNDERFLOW
            vote += error + count * SINGLE * size
            added.append(abs(search.operand.edit.weight) * (error + (count + SLACK) * SINGLE * size))
        total = max(added) if self._rule.majority else sum(added) + count * SINGLE * sum(added)
        return in_single.Errors(1.01 * total, 1.01 * vote)

    def hold(self, aside: _Aside) -> bool:
        """Give each search the elements inside its interval; return False if float32 is too coarse for some change."""
        for number, search in enumerate(self._searches):
            if not search.product >= LEAST_PRODUCT:
                return False
            sizes = aside.changes[number].abs()
            inside = ((sizes > 0) & (sizes < search.bracket.high)).nonzero().squeeze(1)
            places, W = aside.places[inside].long(), aside.W[inside].double()
            search.bracket.hold(sizes[inside], places, W, int(self._above[number]))
        return True

    def finish(self, aside: _Aside, cuts: Sequence[float]) -> None:
        """Combine the elements that were set aside, now that the thresholds are known."""
        flat = self.out.view(-1)
        for first in range(0, len(aside.places), STRIP):
            span = slice(first, first + STRIP)
            places, W, changes = aside.places[span].long(), aside.W[span], aside.changes[:, span]
            kept = torch.empty_like(changes)
            doubts = self._near_cuts(changes, kept, cuts)
            rounded = torch.empty_like(W, dtype=flat.dtype)
            doubts |= in_single.combine(
                self._rule, W, kept, self._errors, work=kept, out=rounded, scratch=self._scratch
            )
            few = doubts.nonzero().squeeze(1)
            rounded[few] = self._exact(places[few], W[few].double(), cuts)
            flat[places] = rounded

    def _near_cuts(self, changes: Tensor, kept: Tensor, cuts: Sequence[float]) -> Tensor:
        """Prune to what is above the thresholds; return marks of the elements that are too near to one."""
        doubts = torch.zeros(changes.shape[1], dtype=torch.uint8)
        for change, pruned, search, cut in zip(changes, kept, self._searches, cuts, strict=True):
            torch.ops.aten.hardshrink(change, cut, out=pruned)
            share, spread = search.errors
            doubts |= (change.abs() - cut).abs() <= 2 * share * (cut + spread)
        return doubts

    def _exact(self, places: Tensor, W: Tensor, cuts: Sequence[float]) -> Tensor:
        """Return the rounded result of single elements, by the definition in float64; W is overwritten."""
        columns, majority = self._item.matrix[1], self._rule.majority
        changes = torch.stack([each.exact(places, W, self._spans, columns) for each in self._searches])
        for change, cut in zip(changes, cuts, strict=True):
            exactly.prune_(change, cut)
        if majority:
            work = [torch.empty_like(W) for _ in range(2)]
            marks = [torch.empty_like(changes, dtype=torch.bool), torch.empty_like(W, dtype=torch.uint8)]
            exactly.elect_(W, changes, self._rule.weights, majority, work=work, marks=marks)
        else:
            exactly.add_up_(W, tuple(changes), self._rule.weights)
        return lora.round_to(W, torch.empty_like(W, dtype=self.out.dtype))

    def _scratch(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._buffers.scratch(name, shape, dtype)


def _largest(raw: Tensor, buffers: DeviceBuffers) -> float:
    """Return the largest magnitude of some stored numbers: as integers without a sign they have the same order."""
    kind = lora.INTEGERS[raw.element_size()]
    sizes = buffers.scratch("size", raw.shape, kind)
    return float(torch.bitwise_and(raw.view(kind), torch.iinfo(kind).max, out=sizes).amax().view(raw.dtype))


def _sums(ones: Tensor) -> Tensor:
    """Return the sum of each row of ones and zeros; the first step adds up to 128 of them in a byte."""
    rows = 128 if ones.shape[1] % 128 == 0 else 1
    return ones.view(len(ones), rows, -1).sum(1, dtype=torch.uint8).sum(1)


def _marked(marks: Tensor) -> Tensor:
    """Return the places of the few marks that are not zero; eight are looked at together."""
    if len(marks) % 8:
        return marks.nonzero().squeeze(1)
    groups = marks.view(torch.int64)
    hits = groups.nonzero().squeeze(1)
    inside = groups[hits].view(torch.uint8).nonzero().squeeze(1)
    return hits.mul_(8)[inside >> 3].add_(inside.bitwise_and_(7))
