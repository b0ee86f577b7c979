"""What a recovered tensor of the base must hold, in float64: the inverse of `expected`, from the record's norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..engine.rows import replaced_rows
from ..plan.item import Item
from ..storage.reader import Reader
from .expected import EPSILON, Block, Expected
from .ulps import half_ulp


class ExpectedBase(Expected):
    """W of an item that is recovered from W', any rows of it."""

    def __init__(self, item: Item, reader: Reader) -> None:
        assert item.undo
        self._undo = item.undo
        self._replaced = replaced_rows(item, reader)
        own = item.undo.original
        self._original = Expected(replace(item, source=own, base=own, undo=None), reader) if own else None
        super().__init__(item, reader)

    def block(self, rows: Sequence[int]) -> Block:
        """Some rows: as merged, each edit's share, and W = (W' − Σ wᵢ·fᵢ·Δᵢ)/(1 + Σ wᵢ·(fᵢ − 1))."""
        merged = self.before(rows)
        parts = self._parts(merged, rows)
        x = merged.clone()
        for edit, part in zip(self.item.edits, parts, strict=True):
            x -= edit.weight * part.f * part.delta
        x = (x / self._share(rows)).nan_to_num(0.0, 0.0, 0.0)
        if self._undo.taken:
            left, right = self._undo.taken
            x += torch.einsum("kr,rc->kc", self._load(left, rows), self._load(right))
        for k, row in enumerate(rows):
            if row in self._replaced:
                stored, place = self._replaced[row]
                x[k] = self._load(stored, [place])[0]
        return Block(merged, parts, x)

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """W, and W'."""
        block = self.block(rows)
        return block.x, block.W

    def bound(self, rows: Sequence[int], x: Tensor, *, rounded_once: bool) -> Tensor:  # noqa: ARG002 - always is
        """How far from x an honest result may be: the arithmetic of one rounding, through the inverse."""
        merged, share = self.before(rows), self._share(rows)
        slack: Tensor = (x.shape[1] ** 0.5 + 6) * EPSILON * (x.abs() + (merged / share).abs())
        for edit, part in zip(self.item.edits, self._parts(merged, rows), strict=True):
            slack += (edit.weight * part.f / share).abs() * (part.terms + 2) * EPSILON * part.size()
        return half_ulp(x, self.item.dtype) + slack.nan_to_num(0.0, 0.0, 0.0)

    def before(self, rows: Sequence[int]) -> Tensor:
        """The tensor as it was merged, or what replaced the base's."""
        return self._load(self.item.source, rows)

    def _share(self, rows: Sequence[int]) -> Tensor:
        """1 + Σ wᵢ·(fᵢ − 1): what is left of W in W'."""
        total = torch.ones((), dtype=torch.float64)
        for edit, part in zip(self.item.edits, self._parts(self.before(rows), rows), strict=True):
            share: Tensor = edit.weight * (part.f - 1)
            total = torch.add(total, share)
        return total

    def _without_start(self) -> None:
        return None

    def _row_norms(self, number: int, V: Tensor, rows: Sequence[int]) -> Tensor:  # noqa: ARG002
        if self._original:
            n = self._original.part(number, rows).n
            assert n is not None
            return n.flatten()
        return self._recorded(number)[list(rows)]

    def _measure(self, number: int) -> Tensor:
        if self._original:
            n = self._original.part(number, [0]).n
            assert n is not None
            return n
        return self._recorded(number)

    def _recorded(self, number: int) -> Tensor:
        stored = self._undo.norms[number]
        assert stored
        return self._load(stored).flatten()
