"""Combine the changes that several edits make to one tensor: chains, and ΔWᵢ pruned, drawn, elected and added.

Thresholds of pruning need the whole tensor, so they are found (engine/thresholds.py) before the first row is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from ..maths import combine as maths
from ..option_table import STRIP, Combination
from ..plan.item import Item
from .changes import LoadedValues, change_of, forget_norms, hold_factors, load_edit, pieces
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit, apply_edits
from .tensor import SourceValues, measure
from .thresholds import Thresholds

if TYPE_CHECKING:
    from .quick_combine import QuickCombiner


class Combiner:
    """Turns blocks of W into blocks of the combined result."""

    def __init__(self, item: Item, buffers: DeviceBuffers, values: SourceValues) -> None:
        """Read the edits, and find the norms and thresholds that need the whole tensor."""
        assert item.combination
        self._item, self._buffers, self._how = item, buffers, item.combination
        self.edits: Sequence[LoadedEdit] = [load_edit(edit, buffers) for edit in item.edits]
        self._keys = [_key(self._how, item.name, number) for number in range(len(self.edits))]
        self.cuts: tuple[tuple[float, int], ...] = ()
        self._quick: QuickCombiner | None = None
        self._prepare(values)

    def _prepare(self, values: SourceValues) -> None:
        if self._how.method == "chain":
            self._measure_chain(values)
            return
        factored = [operand for operand in self.edits if not isinstance(operand, LoadedValues)]
        measure(self._item, factored, values, self._buffers)
        if self._how.prunes:
            thresholds = Thresholds(self._item, self.edits, values, self._buffers)
            self.cuts = tuple(thresholds.find())
            self._quick = _quick_combiner(self._item, thresholds, self._buffers)
        forget_norms(self.edits)

    def rounded(self, raw: Tensor, start: int, stop: int) -> Tensor | None:
        """Return the rounded result of a block, from the base's rows; None if `apply` must compute it."""
        return self._quick.rounded(raw, start, stop) if self._quick else None

    def apply(self, W: Tensor, start: int, stop: int) -> Tensor:
        """Compute the result of all edits in place."""
        if self._how.method == "chain":
            for operand in self.edits:
                apply_edits(W, [operand], start, stop, self._buffers)
            return W
        hold_factors(self.edits, start, stop)
        known = [len(operand.n) for operand in self.edits]
        for first, last in pieces(self._item, start, stop):
            piece = W[first - start : last - start]
            deltas = self._buffers.scratch("deltas", (len(self.edits), *piece.shape), W.dtype)
            for number, delta in enumerate(deltas):
                self._keep_(delta, number, piece, first, last)
            self._merge(piece, deltas)
        for operand, before in zip(self.edits, known, strict=True):
            if len(operand.n) > before + 1:
                operand.n[before:] = [torch.cat(operand.n[before:])]  # of the whole block
        return W

    def _merge(self, W: Tensor, deltas: Tensor) -> Tensor:
        """Add what is kept of all changes to W in place, or what the majority's sign leaves of it."""
        weights = [operand.edit.weight for operand in self.edits]
        if not self._how.elects:
            return maths.add_up_(W, tuple(deltas), weights)
        flat, changes = W.view(-1), deltas.view(len(deltas), -1)
        for first in range(0, len(flat), STRIP):
            strip = slice(first, first + STRIP)
            piece = flat[strip]
            work, marks = self._work(len(piece))
            maths.elect_(piece, changes[:, strip], weights, self._how.majority_sign, work=work, marks=marks)
        return W

    def _work(self, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return scratch space for an election."""
        count = len(self.edits)
        votes = torch.uint8 if count < 1 << 8 else torch.int32
        scratch, compute = self._buffers.scratch, self._buffers.spec.compute
        work = [scratch(f"elect {k}", (size,), compute) for k in range(2)]
        return work, [scratch("elect agrees", (count, size), torch.bool), scratch("elect count", (size,), votes)]

    def _keep_(self, delta: Tensor, number: int, W: Tensor, start: int, stop: int) -> None:
        """Compute what is kept of the change of one edit."""
        change_of(self.edits[number], W, start, stop, out=delta)
        if self._how.prunes:
            least, last = self.cuts[number]
            maths.prune_(delta, least)
            if last >= 0:
                maths.drop_equal_(delta, least, last + 1 - start * W.shape[1])
        elif self._how.draws:
            density = self.edits[number].edit.density
            words = maths.random_words(self._keys[number], start, (stop - start, W.shape[1]), W.device)
            draw = maths.drop_by_rank_ if self._how.method == "della" else maths.drop_
            draw(delta, words, density)

    def _measure_chain(self, values: SourceValues) -> None:
        """Compute each link's norms along the columns, of the result of the links before, in one pass a link."""
        for link, operand in enumerate(self.edits):
            if operand.edit.two_passes or operand.transform:
                before = _ChainValues(values, self.edits[:link])
                measure(self._item, [operand], before, self._buffers)
                forget_norms(self.edits)


class _ChainValues(SourceValues):
    """The values that a link starts from: those of the links before."""

    def __init__(self, values: SourceValues, links: Sequence[LoadedEdit]) -> None:
        self._values, self._links = values, links

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Return a block after the links before."""
        W = self._values.block(raw, start, stop)
        for operand in self._links:
            apply_edits(W, [operand], start, stop)
        return W


def _quick_combiner(item: Item, thresholds: Thresholds, buffers: DeviceBuffers) -> QuickCombiner | None:
    """Return what combines an item in float32; None if all thresholds were found otherwise."""
    if not thresholds.quick:
        return None
    from .quick_combine import QuickCombiner, suits

    changes = [thresholds.quick[number] for number in sorted(thresholds.quick)]
    return QuickCombiner(item, changes, buffers) if suits(item, changes) else None


def _key(how: Combination, name: str, number: int) -> int:
    """Return the key of the random numbers for one edit of a tensor."""
    return xxhash.xxh3_64_intdigest(f"{how.seed}/{number}/{name}".encode())
