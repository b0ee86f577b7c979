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

    def block(self, rows: Sequence[int]) -> Block:
        """Return some rows before any edit, each link's part, and the last link's result."""
        first = W = self.before(rows)
        parts = []
        for number in range(len(self.item.edits)):
            parts.append(self._part(number, W, rows))
            W = self._after(number, parts[-1], W)
        return Block(first, parts, W)

    def bound(self, rows: Sequence[int], x: Tensor, *, rounded_once: bool) -> Tensor:
        """Return the largest distance from x: the slack of each link, as the links after it pass it on."""
        W, item = self.before(rows), self.item
        total = torch.zeros_like(W)
        for number, edit in enumerate(item.edits):
            part = self._part(number, W, rows)
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
        squares: Tensor | float = 0.0
        for chunk in self.chunks(range(self.item.source.matrix[0])):
            W = self.before(chunk)
            for link in range(number):
                W = self._after(link, self._part(link, W, chunk), W)
            squares = squares + (W + self._delta(number, W, chunk)).square().sum(dim=0)
        return torch.as_tensor(squares).sqrt()

    def _delta(self, number: int, W: Tensor, rows: Sequence[int]) -> Tensor:  # noqa: ARG002 - for kinds that need W
        left, right, scale = self.factors(number, rows)
        return scale * torch.einsum("kr,rc->kc", left, right)


def outputs_of(block: Block, x: Tensor, *, by_columns: bool) -> Tensor:
    """Return the outputs of some rows' result for inputs x."""
    return block.x.T @ x if by_columns else block.x @ x
