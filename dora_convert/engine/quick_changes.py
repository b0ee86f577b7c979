"""Compute low-rank changes in float32 and in float64, block by block or element by element.

A change is g·W + s·f·BA with f = m/‖V‖ and g = f − 1, which float32 holds to a few parts in a million.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..maths.bracket import Bracket
from ..maths.in_single import SINGLE
from ..option_table import TILE, TILE_WIDTH
from ..plan.item import Item
from .device_buffers import DeviceBuffers
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
    """An edit's change of a block: g·W + f·left·right."""

    f: Tensor | None  # broadcasts over the block; None is 1, and g = f − 1
    left: Tensor
    right: Tensor

    def columns(self, chosen: slice) -> ChangePart:
        """Return what makes some columns of the change."""
        f = self.f if self.f is None or self.f.shape[1] == 1 else self.f[:, chosen]
        return ChangePart(f, self.left, self.right[:, chosen])

    def change(self, W: Tensor) -> Tensor:
        """Return the change in float64."""
        product = self.left @ self.right
        return product if self.f is None else product.add_(W).mul_(self.f).sub_(W)

    def elements(self, W: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the change of single elements in float64."""
        left, right = self.left.index_select(0, rows), self.right.index_select(1, columns)
        product = left.mul_(right.T).sum(1)
        if self.f is None:
            return product
        f = self.f.expand(len(self.left), self.right.shape[1])[rows, columns]
        return product.add_(W).mul_(f).sub_(W)


class SinglePart(NamedTuple):
    """An edit's change of a block in float32: g·W + left·right, and how large it may be."""

    exact: ChangePart
    g: Tensor | None
    left: Tensor
    right: Tensor
    largest: float
    """|g| is at most this."""
    product: Tensor  # (rows, 1), float64
    """The magnitudes of a product's terms add up to this at most."""

    @property
    def factors(self) -> list[Tensor]:
        """g, left and right as maths/block_steps.py takes them."""
        return [self.left.new_empty(0) if self.g is None else self.g, self.left, self.right]


def tile(block: Sequence[int]) -> tuple[int, int]:
    """Return how many rows and columns of a block of some shape are taken together in float32."""
    width = max(1, min(block[1], TILE_WIDTH))
    return max(1, min(block[0], TILE // width)), width


def groups_of(marks: Tensor) -> Tensor:
    """Return marks, eight of them as one number; the marks themselves if eight are not a divisor."""
    return marks if marks.numel() % 8 else marks.view(-1).view(torch.int64)


class _Right(NamedTuple):
    """The right factor of some blocks in float32, and the largest norm of its columns."""

    of: Tensor
    single: Tensor
    largest: float


class QuickChange:
    """One edit's change, and the search of its threshold."""

    def __init__(self, operand: LoadedEdit, bracket: Bracket) -> None:
        self.operand, self.bracket = operand, bracket
        self.sample: list[Tensor] = []
        self.product = 0.0
        """The largest sum of the magnitudes of a product's terms may be so large."""
        self._right: _Right | None = None
        self.divides_rows = operand.m is not None and not operand.edit.two_passes
        self.norms = torch.empty(len(operand.m) if operand.m is not None else 0, dtype=torch.float64)
        """Of all rows, if the edit divides by these."""
        self.cut = self.middle = 0.0
        """A number that parts the k largest magnitudes from the others, in float64 and in float32."""
        self.near: tuple[int, ...] = ()
        """Places of the elements that float32 does not part, in ascending order."""

    def factors(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return rows of s·B, and A: turned, if the weight is stored so."""
        factors, low = self.operand.factors, self.operand.edit.low
        assert factors
        assert low
        return factors.left(start, stop) * low.scale, factors.right(start)

    def part(self, start: int, stop: int) -> ChangePart:
        """Return what makes the change of a block, in float64; norms of rows are known."""
        operand = self.operand
        if operand.m is None:
            return ChangePart(None, *self.factors(start, stop))
        n = self.norms[start:stop] if self.divides_rows else operand.n[-1]
        m = operand.m[start:stop] if self.divides_rows else operand.m
        return ChangePart((m / n).unsqueeze(operand.edit.axis), *self.factors(start, stop))

    def single(self, start: int, stop: int) -> SinglePart:
        """Return what makes the change of a block, in float32, and note how large the product's terms may be."""
        part = self.part(start, stop)
        left = part.left if part.f is None or not self.divides_rows else part.left * part.f
        right = self._single(part)
        product = torch.linalg.vector_norm(left, dim=1, keepdim=True).mul_(right.largest)
        self.product = max(self.product, float(product.max()))
        g = None if part.f is None else part.f - 1
        largest, g = (0.0, None) if g is None else (float(g.abs().max()), g.float())
        return SinglePart(part, g, left.float(), right.single, largest=largest, product=product)

    @property
    def errors(self) -> tuple[float, float]:
        """A magnitude x in float32 is off by at most the first number times x + the second.

        Each of the rank's products, and g·W, is rounded some times. As g·W is the change less the product, it is no
        larger than x and the product together.
        """
        assert self.operand.edit.low
        terms = self.operand.edit.low.rank * max(self.operand.edit.low.blocks) + SLACK
        return 1.01 * terms * SINGLE, 2 * self.product

    def _single(self, part: ChangePart) -> _Right:
        """Return the right factor, with norms of columns multiplied in; most blocks have that of the one before."""
        same = self._right and self._right.of.data_ptr() == part.right.data_ptr()  # the old one is alive
        if not self._right or not same:
            scaled = part.right if part.f is None or self.divides_rows else part.right * part.f
            largest = float(scaled.square().sum(0).max().sqrt())
            self._right = _Right(part.right, scaled.float(), largest)
        return self._right

    def exact(self, places: Tensor, W: Tensor, spans: Sequence[tuple[int, int]], columns: int) -> Tensor:
        """Return the change of single elements in float64; places are in the order of the spans."""
        rows, cols = places // columns, places % columns
        edges = torch.searchsorted(rows, torch.tensor([start for start, _ in spans])).tolist()
        found = torch.empty_like(W)
        for (start, stop), first, last in zip(spans, edges, [*edges[1:], len(rows)], strict=True):
            if first < last:
                few = slice(first, last)
                found[few] = self.part(start, stop).elements(W[few], rows[few] - start, cols[few])
        return found
