"""Compute low-rank changes in float32 and in float64, block by block or element by element.

A change is g·W + s·f·BA with f = m/‖V‖ and g = f − 1, which float32 holds to a few parts in a million.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..maths.block_steps import elements_of
from ..maths.bracket import Bracket
from ..maths.in_single import SINGLE
from ..option_table import STRIP, TILE_WIDTH
from ..plan.item import Item
from .changes import hold_factors
from .device_buffers import FACTOR_ELEMENTS, DeviceBuffers
from .factors import LoadedEdit

SLACK = 8
"""Roundings beside those of the rank's products."""


def is_low_rank(operand: LoadedEdit, buffers: DeviceBuffers) -> bool:
    """Return True if an edit's change can be computed as g·W + s·f·BA on a processor."""
    edit, spec = operand.edit, buffers.spec
    plain = operand.factors is not None and edit.outputs is None and edit.kernel == 1 and edit.follows is None
    return plain and (operand.m is None or edit.divides) and not spec.staged and spec.compute == torch.float64


def holds_base(item: Item) -> bool:
    """Return True if the stored numbers of the base are what edits start from, and are numbers of float32."""
    plain = not (item.source.coded or item.rows or item.start)
    return plain and item.source.dtype in ("BF16", "F16", "F32")


class ChangePart(NamedTuple):
    """An edit's change of a block in float64: f·(W + scale·left·right) − W."""

    f: Tensor | None  # broadcasts over the block; None is 1
    left: Tensor
    right: Tensor
    scale: float

    @property
    def factors(self) -> list[Tensor]:
        """f, left and right as maths/block_steps.py takes them."""
        return [self.left.new_empty(0) if self.f is None else self.f, self.left, self.right]


class SinglePart(NamedTuple):
    """An edit's change of some rows in float32: g·W + left·right with g = f − 1, and how large it may be."""

    g: Tensor  # empty if it is zero
    left: Tensor
    right: Tensor
    largest: float
    """|g| is at most this."""
    product: Tensor  # (rows, 1), float64
    """The magnitudes of a product's terms add up to this at most."""

    def factors(self, first: int, last: int) -> list[Tensor]:
        """Return g, left and right of some rows as maths/block_steps.py takes them."""
        g = self.g[first:last] if len(self.g) == len(self.left) else self.g
        return [g, self.left[first:last], self.right]


def tile(block: Sequence[int]) -> tuple[int, int]:
    """Return how many rows and columns of a block of some shape are taken together."""
    width = max(1, min(block[1], TILE_WIDTH))
    return max(1, min(block[0], STRIP // width)), width


def groups_of(marks: Tensor) -> Tensor:
    """Return marks, eight of them as one number; the marks themselves if eight are not a divisor."""
    return marks if marks.numel() % 8 else marks.view(-1).view(torch.int64)


class _Right(NamedTuple):
    """The right factor of some blocks in other forms."""

    of: Tensor
    turned: Tensor  # (columns, rank): the numbers of a column lie together
    single: Tensor  # float32, with norms of columns multiplied in
    largest: float
    """The largest norm of its columns."""


class QuickChange:
    """One edit's change, and the search of its threshold."""

    def __init__(self, operand: LoadedEdit, bracket: Bracket) -> None:
        self.operand, self.bracket = operand, bracket
        self.sample: list[Tensor] = []
        self.product = 0.0
        """The largest sum of the magnitudes of a product's terms may be so large."""
        self._right: _Right | None = None
        self._single: tuple[int, int, SinglePart] | None = None
        self.divides_rows = operand.m is not None and not operand.edit.two_passes
        self.norms = torch.empty(len(operand.m) if operand.m is not None else 0, dtype=torch.float64)
        """Of all rows, if the edit divides by these."""
        self.cut = self.middle = 0.0
        """A number that parts the k largest magnitudes from the others, in float64 and in float32."""
        self.near: tuple[int, ...] = ()
        """Places of the elements that float32 does not part, in ascending order."""

    def factors(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return rows of B, and A: turned, if the weight is stored so."""
        factors = self.operand.factors
        assert factors
        return factors.left(start, stop), factors.right(start)

    @property
    def scale(self) -> float:
        """The s of s·BA."""
        assert self.operand.edit.low
        return self.operand.edit.low.scale

    def part(self, start: int, stop: int) -> ChangePart:
        """Return what makes the change of a block, in float64; norms of rows are known."""
        operand = self.operand
        if operand.m is None:
            return ChangePart(None, *self.factors(start, stop), self.scale)
        n = self.norms[start:stop] if self.divides_rows else operand.n[-1]
        m = operand.m[start:stop] if self.divides_rows else operand.m
        return ChangePart((m / n).unsqueeze(operand.edit.axis), *self.factors(start, stop), self.scale)

    def single(self, start: int, stop: int, height: int) -> tuple[int, SinglePart]:
        """Return what makes the change of some rows in float32, and the number of the first: all rows, if few.

        The weight has `height` rows.
        """
        if not self._single or not self._single[0] <= start < stop <= self._single[1]:
            span = self._span(start, stop, height)
            self._single = (*span, self._rounded(self.part(*span)))
        return self._single[0], self._single[2]

    def _span(self, start: int, stop: int, height: int) -> tuple[int, int]:
        """Return which rows are looked at together with some rows: all, if these are few."""
        low = self.operand.edit.low
        assert low
        few = not low.experts and height * low.rank <= FACTOR_ELEMENTS
        return (0, height) if few else (start, stop)

    def elements(self, start: int, stop: int) -> list[Tensor]:
        """Return what makes single elements of a block in float64: f, left, and right turned."""
        part = self.part(start, stop)
        return [*part.factors[:2], self._right_of(part).turned]

    def _rounded(self, part: ChangePart) -> SinglePart:
        """Return a part in float32, and note how large the product's terms may be."""
        left = part.left * part.scale
        if part.f is not None and self.divides_rows:
            left.mul_(part.f)
        right = self._right_of(part)
        product = torch.linalg.vector_norm(left, dim=1, keepdim=True).mul_(right.largest)
        self.product = max(self.product, float(product.max()))
        g = left.new_empty(0) if part.f is None else part.f - 1
        largest = 0.0 if part.f is None else float(g.abs().max())
        return SinglePart(g.float(), left.float(), right.single, largest=largest, product=product)

    @property
    def errors(self) -> tuple[float, float]:
        """A magnitude x in float32 is off by at most the first number times x + the second.

        Each of the rank's products, and g·W, is rounded some times. As g·W is the change less the product, it is no
        larger than x and the product together.
        """
        assert self.operand.edit.low
        terms = self.operand.edit.low.rank * max(self.operand.edit.low.blocks) + SLACK
        return 1.01 * terms * SINGLE, 2 * self.product

    def _right_of(self, part: ChangePart) -> _Right:
        """Return the forms of the right factor; most blocks have that of the one before."""
        same = self._right and self._right.of.data_ptr() == part.right.data_ptr()  # the old one is alive
        if not self._right or not same:
            scaled = part.right if part.f is None or self.divides_rows else part.right * part.f
            largest = float(scaled.square().sum(0).max().sqrt())
            self._right = _Right(part.right, part.right.T.contiguous(), scaled.float(), largest=largest)
        return self._right

    def exact(self, places: Tensor, W: Tensor, spans: Sequence[tuple[int, int]], columns: int) -> Tensor:
        """Return the change of single elements in float64; places are in the order of the spans."""
        rows, cols = places // columns, places % columns
        height = spans[-1][1]
        together = spans if self._span(*spans[0], height) == spans[0] else [(0, height)]
        edges = torch.searchsorted(rows, torch.tensor([start for start, _ in together])).tolist()
        found = torch.empty_like(W)
        for (start, stop), first, last in zip(together, edges, [*edges[1:], len(rows)], strict=True):
            if first < last:
                few = slice(first, last)
                hold_factors([self.operand], start, stop)
                change = self.elements(start, stop)
                found[few] = elements_of(W[few], change, self.scale, rows[few] - start, cols[few])
        return found
