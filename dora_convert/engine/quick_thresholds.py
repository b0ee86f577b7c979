"""Find the thresholds of low-rank changes by approximate changes in float32, and settle the doubtful ones in float64.

A change is g·W + s·f·BA with f = m/‖V‖ and g = f − 1, which float32 holds to a few parts in a million. The exact norms
come first, in a pass that also takes a sample. The second pass counts. The last pass of a merge needs no order but that
of magnitudes on each side of a threshold, so a number between two magnitudes is as good as the k-th largest itself.
Searches that fail, as where many magnitudes are equal, are left to the exact way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..maths import lora
from ..maths.bracket import Bracket, Near, parting
from ..option_table import COLLECTED, held_elements, sample_size
from ..plan.item import Item
from .changes import GOLDEN, hold_factors, refuse_infinite
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit
from .tensor import SourceValues

SINGLE, DOUBLE = 2.0**-24, 2.0**-53
CANCELLED = 2.0**-10
"""Squares of norms below this part of ‖W‖² have lost digits."""
ATTEMPTS = 3.2, 8.0
"""Distances of bounds from a sample's k-th largest, in standard errors: a few searches in a hundred need the second."""
SLACK = 8
"""Roundings beside those of the rank's products."""


def is_low_rank(operand: LoadedEdit, buffers: DeviceBuffers) -> bool:
    """Return True if an edit's change can be computed as g·W + s·f·BA on a processor."""
    edit, spec = operand.edit, buffers.spec
    plain = operand.factors is not None and edit.outputs is None and edit.kernel == 1 and edit.follows is None
    return plain and (operand.m is None or edit.divides) and not spec.staged and spec.compute == torch.float64


def fits(numel: int) -> bool:
    """Return True if a search is likely to hold few enough elements."""
    return held_elements(numel) <= COLLECTED


@dataclass
class _Part:
    """An edit's change of a block: g·W + f·left·right."""

    f: Tensor | None  # broadcasts over the block; None is 1, and g = f − 1
    left: Tensor
    right: Tensor

    def columns(self, chosen: slice) -> _Part:
        """Return what makes some columns of the change."""
        f = self.f if self.f is None or self.f.shape[1] == 1 else self.f[:, chosen]
        return _Part(f, self.left, self.right[:, chosen])

    def change(self, W: Tensor) -> Tensor:
        """Return the change in float64."""
        product = self.left @ self.right
        return product if self.f is None else product.add_(W).mul_(self.f).sub_(W)


@dataclass
class _Right:
    """The right factor of some blocks in float32, and the largest norm of its columns."""

    of: Tensor
    single: Tensor
    largest: float


class _ThresholdSearch:
    """The search of one edit's threshold."""

    def __init__(self, operand: LoadedEdit, bracket: Bracket) -> None:
        self.operand, self.bracket = operand, bracket
        self.sample: list[Tensor] = []
        self.product = 0.0
        """The largest sum of the magnitudes of a product's terms may be so large."""
        self._right: _Right | None = None
        self.divides_rows = operand.m is not None and not operand.edit.two_passes
        self.norms = torch.empty(len(operand.m) if operand.m is not None else 0, dtype=torch.float64)
        """Of all rows, if the edit divides by these."""

    def factors(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return rows of s·B, and A: turned, if the weight is stored so."""
        factors, low = self.operand.factors, self.operand.edit.low
        assert factors
        assert low
        return factors.left(start, stop) * low.scale, factors.right(start)

    def part(self, start: int, stop: int) -> _Part:
        """Return what makes the change of a block, in float64; norms of rows are known."""
        operand = self.operand
        if operand.m is None:
            return _Part(None, *self.factors(start, stop))
        n = self.norms[start:stop] if self.divides_rows else operand.n[-1]
        m = operand.m[start:stop] if self.divides_rows else operand.m
        return _Part((m / n).unsqueeze(operand.edit.axis), *self.factors(start, stop))

    def approximate(self, W: Tensor, out: Tensor, span: tuple[int, int]) -> Tensor:
        """Return the change of a block in float32, and note how large the product's terms may be."""
        part = self.part(*span)
        left = part.left if part.f is None or not self.divides_rows else part.left * part.f
        right = self._single(part)
        if part.f is None:
            torch.mm(left.float(), right.single, out=out)
        else:
            torch.mul(W, (part.f - 1).float(), out=out).addmm_(left.float(), right.single)
        self.product = max(self.product, float(left.square().sum(1).max().sqrt()) * right.largest)
        return out

    @property
    def errors(self) -> tuple[float, float]:
        """A magnitude x in float32 is off by at most the first number times x + the second.

        Each of the rank's products, and g·W, is rounded some times. As g·W is the change less the product, it is no
        larger than x and the product together.
        """
        assert self.operand.edit.low
        terms = self.operand.edit.low.rank * max(self.operand.edit.low.blocks) + SLACK
        return 1.01 * terms * SINGLE, 2 * self.product

    def _single(self, part: _Part) -> _Right:
        """Return the right factor, with norms of columns multiplied in; most blocks have that of the one before."""
        same = self._right and self._right.of.data_ptr() == part.right.data_ptr()  # the old one is alive
        if not self._right or not same:
            scaled = part.right if part.f is None or self.divides_rows else part.right * part.f
            largest = float(scaled.square().sum(0).max().sqrt())
            self._right = _Right(part.right, scaled.float(), largest)
        return self._right

    def exact(self, near: Near, spans: Sequence[tuple[int, int]], columns: int) -> tuple[Tensor, Tensor]:
        """Return the magnitudes of single elements in float64, and of what they are the difference of.

        Places are in the order of the spans.
        """
        rows, cols = near.places // columns, near.places % columns
        edges = torch.searchsorted(rows, torch.tensor([start for start, _ in spans])).tolist()
        found = torch.zeros_like(near.weights)
        for (start, stop), first, last in zip(spans, edges, [*edges[1:], len(rows)], strict=True):
            if first < last:
                part, row, col = self.part(start, stop), rows[first:last] - start, cols[first:last]
                product, W = (part.left[row] * part.right[:, col].T).sum(dim=1), near.weights[first:last]
                f = None if part.f is None else part.f.flatten()[row if self.divides_rows else col]
                found[first:last] = product if f is None else (W + product) * f - W
        return found.abs_(), near.weights.abs() + found


class QuickThresholds:
    """Finds the thresholds of some edits in two passes."""

    def __init__(self, item: Item, values: SourceValues, buffers: DeviceBuffers) -> None:
        self._item, self._values, self._buffers = item, values, buffers
        self._spans, self._step = list(item.spans()), _step(item)

    def find(self, operands: dict[int, tuple[LoadedEdit, int]]) -> dict[int, float]:
        """Return a number that parts the k largest magnitudes from the others, for each edit where this succeeds.

        `operands` are edits and their k, by the edit's number.
        """
        numel = self._item.source.numel
        searches = {number: _ThresholdSearch(operand, Bracket(k, numel)) for number, (operand, k) in operands.items()}
        self._measure(list(searches.values()))
        for each in searches.values():
            each.operand.known = each.norms if each.divides_rows else None
        cuts: dict[int, float] = {}
        for sigmas in ATTEMPTS:
            chosen = {k: each for k, each in searches.items() if each.bracket.choose(torch.cat(each.sample), sigmas)}
            self._count(list(chosen.values()))
            found = {number: self._settle(each) for number, each in chosen.items()}
            cuts |= {number: cut for number, cut in found.items() if cut is not None}
            searches = {number: each for number, each in chosen.items() if each.bracket.missed}
        return cuts

    def _measure(self, searches: Sequence[_ThresholdSearch]) -> None:
        """Compute the norms of rows, and take samples of the changes."""
        dividing = [each for each in searches if each.divides_rows]
        gram = _Gram(dividing)
        for number, span in enumerate(self._spans):
            hold_factors([each.operand for each in searches], *span)
            W = self._block(searches, *span)
            for each, n in zip(dividing, gram.norms(W, span) if dividing else (), strict=True):
                refuse_infinite(each.operand, self._item, n)
                each.norms[slice(*span)] = n
            columns = slice(int(number * GOLDEN % 1 * self._step), None, self._step)
            few = W[:, columns].contiguous()
            for each in searches:
                each.sample.append(each.part(*span).columns(columns).change(few).abs_().float().flatten())

    def _count(self, searches: Sequence[_ThresholdSearch]) -> None:
        """Count the changes above each interval, and hold those inside."""
        for span in self._spans if searches else ():
            hold_factors([each.operand for each in searches], *span)
            W = self._block(searches, *span)
            single = self._scratch("single W", W.shape)
            if any(each.operand.edit.depends for each in searches):
                single.copy_(W)
            change, chosen = (self._scratch(name, W.shape) for name in ("single", "chosen"))
            for each in searches:
                each.approximate(single, change, span)
                each.bracket.add(change, chosen, W, span[0] * W.shape[1])

    def _block(self, searches: Sequence[_ThresholdSearch], start: int, stop: int) -> Tensor:
        """Return a block of W; of any values if no change needs W."""
        if any(each.operand.edit.depends for each in searches):
            return self._values.block(self._buffers.raw(self._item.source, start, stop), start, stop)
        return self._buffers.scratch("work", (stop - start, self._item.matrix[1]), torch.float64)

    def _scratch(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._buffers.scratch(name, shape, torch.float32)

    def _settle(self, search: _ThresholdSearch) -> float | None:
        """Return a number that parts the k largest magnitudes from the others; None if it must be found otherwise."""
        share, spread = search.errors
        if not math.isfinite(spread) or (near := search.bracket.near(share, spread)) is None:
            return None
        magnitudes, sizes = search.exact(near, self._spans, self._item.matrix[1])
        rest = share * DOUBLE / SINGLE * (spread + float(sizes.max()))
        return parting(magnitudes, near.rank, near.error, rest)


class _Gram:
    """Computes norms of V = W + s·BA from W·Aᵀ: ‖V‖² = ‖W‖² + 2s·⟨WAᵀ, B⟩ + s²·‖BA‖², for all edits at once."""

    def __init__(self, searches: Sequence[_ThresholdSearch]) -> None:
        self._searches = searches
        self._rights: list[Tensor] = []
        self._stacked = torch.empty(0)
        self._squares: list[Tensor] = []

    def norms(self, W: Tensor, span: tuple[int, int]) -> list[Tensor]:
        """Return the norms of a block's rows for each edit."""
        factors = [each.factors(*span) for each in self._searches]
        self._keep([right for _, right in factors])
        squares = lora.norms(W, axis=1).square_()
        mixed = torch.split(W @ self._stacked.T, [len(right) for right in self._rights], dim=1)
        found = []
        for each, (rows, _), own, gram in zip(self._searches, factors, mixed, self._squares, strict=True):
            left = rows * each.operand.edit.norm_ratio
            total = squares + (left * own).sum(1).mul_(2) + (left @ gram).mul_(left).sum(1)
            found.append(total.sqrt_() if bool((total > CANCELLED * squares).all()) else self._direct(each, W, span))
        return found

    def _keep(self, rights: list[Tensor]) -> None:
        """Stack the right factors, if they are not those of the block before."""
        if [id(right) for right in rights] != [id(right) for right in self._rights]:
            self._rights, self._stacked = rights, torch.cat(rights)
            self._squares = [right @ right.T for right in rights]

    def _direct(self, search: _ThresholdSearch, W: Tensor, span: tuple[int, int]) -> Tensor:
        """Return norms of rows that nearly cancel, of which the sum above has lost digits."""
        return search.operand.norms_of_rows(W.clone(), *span)


def _step(item: Item) -> int:
    """Return the distance of the columns that a sample has of each block."""
    return max(1, min(item.source.numel // sample_size(item.source.numel), item.matrix[1]))
