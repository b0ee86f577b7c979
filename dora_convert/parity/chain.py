"""Compute a chain of edits by definition, for any rows: each on the result of the one before."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.precision import half_ulp
from .expected import EPSILON, Block, EditPart, Expected
from .roundings import several_roundings


class ChainExpected(Expected):
    """Each edit on the result of the one before."""

    _link = 0
    """The link whose weight is wanted: `before` returns the result of the links before it."""

    def before(self, rows: Sequence[int]) -> Tensor:
        """Return some rows before the link at hand."""
        W, last = super().before(rows), self._link
        for number in range(last):
            W = self._after(number, self._part_of(number, W, rows), W)
        self._link = last
        return W

    def block(self, rows: Sequence[int]) -> Block:
        """Return some rows before any edit, each link's part, and the last link's result."""
        first = W = self.before(rows)
        parts = []
        for number in range(len(self.item.edits)):
            parts.append(self._part_of(number, W, rows))
            W = self._after(number, parts[-1], W)
        self._link = 0
        return Block(first, parts, W)

    def _part_of(self, number: int, W: Tensor, rows: Sequence[int]) -> EditPart:
        """Return the part of one link in some rows, which the links before have made W."""
        self._link = number
        return self._part(number, W, rows)

    def bound(self, rows: Sequence[int], x: Tensor, *, rounded_once: bool) -> Tensor:
        """Return the largest distance from x: the slack of each link, as the links after it pass it on."""
        W, item = self.before(rows), self.item
        total = torch.zeros_like(W)
        for number, edit in enumerate(item.edits):
            part = self._part_of(number, W, rows)
            slack = (part.terms + 2) * EPSILON * (part.size() + W.abs())
            if not rounded_once:
                slack = slack + half_ulp(part.delta, item.dtype) + half_ulp(W, item.dtype)
                if part.n is not None:
                    after = self._after(number, part, W)
                    slack = slack + several_roundings(item, edit, W, part.delta, f=part.f, n=part.n, x=after)
            passed = total * (1 + edit.weight * (part.f - 1)).abs() + abs(edit.weight) * part.f.abs() * slack
            W = self._after(number, part, W)
            if part.n is not None:
                lengths = torch.linalg.vector_norm(total, dim=edit.axis, keepdim=True) / part.n
                passed = passed + abs(edit.weight) * W.abs() * lengths
            total = passed + (math.sqrt(W.shape[1]) + 6) * EPSILON * W.abs()
        self._link = 0
        return half_ulp(x, item.dtype) + total

    def forward(self, rows: Sequence[int], block: Block, x: Tensor, *, by_columns: bool) -> Tensor:  # noqa: ARG002
        """Return the outputs of the last link's result."""
        return outputs_of(block, x, by_columns=by_columns)

    def _after(self, number: int, part: EditPart, W: Tensor) -> Tensor:
        """Return the result of one link."""
        weight = self.item.edits[number].weight
        changed = (W + part.delta) * part.f
        return changed if weight == 1 else W + weight * (changed - W)

    def _measure(self, number: int) -> Tensor:
        """Return the norms of one link along the columns, from the whole tensor."""
        self._link = number
        n = super()._measure(number)
        self._link = 0
        return n


def outputs_of(block: Block, x: Tensor, *, by_columns: bool) -> Tensor:
    """Return the outputs of some rows' result for inputs x."""
    return block.x.T @ x if by_columns else block.x @ x
