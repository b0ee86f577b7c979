"""Find the least magnitude that pruning keeps of each change: passes over the tensor before its first row is written.

Each pass computes the same blocks with the same operations as the last one, so that all passes see the same bits. A
sample of rows from all parts of the tensor comes first: with it, one pass is enough for nearly all tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..maths.kth_largest import KthLargest
from ..option_table import COLLECTED
from ..plan.item import Item
from .changes import (
    LoadedValues,
    change_of,
    forget_norms,
    hold_factors,
    pieces,
    refuse_infinite,
    sampled,
    scattered,
    wanted_rank,
)
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit
from .tensor import SourceValues

if TYPE_CHECKING:
    from .quick_changes import QuickChange

See = Callable[[int, Tensor, tuple[int, int]], None]
"""Takes the number of an edit, a block of its change, and the rows of the block."""


class Thresholds:
    """Finds the least magnitude that each edit keeps."""

    def __init__(
        self, item: Item, operands: Sequence[LoadedEdit], values: SourceValues, buffers: DeviceBuffers
    ) -> None:
        self._item, self._operands, self._values, self._buffers = item, operands, values, buffers
        self._found = [
            KthLargest(*ranks, COLLECTED) if (ranks := wanted_rank(operand.edit, item)) else None
            for operand in operands
        ]
        self.quick: dict[int, QuickChange] = {}
        """Changes whose thresholds were found in float32, by the edit's number."""

    def find(self) -> list[tuple[float, int]]:
        """Return the least magnitude for each edit, and the flat place of the last of its equals; −1 for all."""
        self._look_quickly()
        self._look()
        while pending := [number for number, found in enumerate(self._found) if found and not found.done]:
            self._pass(pending, self._add, scattered(self._item))
            for number in pending:
                self._search(number).finish()
        return [(found.value if found else 0.0, self._last_place(number)) for number, found in enumerate(self._found)]

    def _look_quickly(self) -> None:
        """Find the thresholds of large low-rank changes in float32."""
        from .quick_changes import is_low_rank
        from .quick_thresholds import QuickThresholds, fits

        operands = {
            number: (operand, found.k)
            for number, (operand, found) in enumerate(zip(self._operands, self._found, strict=True))
            if found
            and not found.done
            and found.n > COLLECTED
            and fits(found.n)
            and is_low_rank(operand, self._buffers)
        }
        quick = QuickThresholds(self._item, self._values, self._buffers)
        self.quick = quick.find(operands) if operands else {}
        for number, change in self.quick.items():
            self._search(number).end(change.cut)

    def _look(self) -> None:
        """Show each search a sample, if it cannot hold all numbers."""
        large = [k for k, found in enumerate(self._found) if found and not found.done and found.n > COLLECTED]
        parts: dict[int, list[Tensor]] = {number: [] for number in large}
        spans = sampled(self._item)
        rows = sum(stop - start for start, stop in spans)

        def see(number: int, change: Tensor, span: tuple[int, int]) -> None:
            own = self._operands[number].own(change, *span)
            wanted = self._search(number).sample_size
            step = max(1, rows * own.shape[1] // wanted) | 1  # odd, so that it meets all columns
            rows_or_all = [own.reshape(-1)] if len(spans) > 1 else own
            parts[number] += [part[::step].float() for part in rows_or_all if part.numel()]

        if large:
            self._pass(large, see, spans)
        for number, samples in parts.items():
            if len(samples) > 1:
                length = min(map(len, samples))
                self._search(number).look(torch.stack([sample[:length] for sample in samples]))

    def _add(self, number: int, change: Tensor, span: tuple[int, int]) -> None:
        """Show the outputs of a block that an edit changes to the search of its threshold."""
        own = self._operands[number].own(change, *span)
        names = ("single", "chosen")
        self._search(number).add(own, [self._buffers.scratch(name, own.shape, torch.float32) for name in names])

    def _search(self, number: int) -> KthLargest:
        found = self._found[number]
        assert found
        return found

    def _last_place(self, number: int) -> int:
        """Return the flat place of the last kept element that equals the threshold; −1 if all such are kept."""
        found = self._found[number]
        if not found or found.wanted == found.equal or not found.value:
            return -1
        left, places = found.wanted, list[int]()

        def count(_: int, change: Tensor, span: tuple[int, int]) -> None:
            nonlocal left
            equal = (change.abs() == found.value).flatten().nonzero().flatten()
            if 0 < left <= len(equal):
                places.append(span[0] * change.shape[1] + int(equal[left - 1]))
            left -= len(equal)

        self._pass([number], count, self._item.spans())
        return places[0]

    def _pass(self, numbers: Sequence[int], see: See, spans: Iterable[tuple[int, int]]) -> None:
        """Show some edits' changes, block by block."""
        reads = any(_needs_base(self._operands[number]) for number in numbers)
        for span in spans:
            W = self._block(*span, reads=reads)
            hold_factors(self._operands, *span)
            for piece in pieces(self._item, *span):
                part = W[piece[0] - span[0] : piece[1] - span[0]]
                delta = self._buffers.scratch("deltas", part.shape, W.dtype)
                for number in numbers:
                    operand = self._operands[number]
                    change_of(operand, part, *piece, out=delta)
                    refuse_infinite(operand, self._item)
                    see(number, delta, piece)
                forget_norms(self._operands)

    def _block(self, start: int, stop: int, *, reads: bool) -> Tensor:
        """Return a block of W; its values do not matter if no edit reads them."""
        if reads:
            return self._values.block(self._buffers.raw(self._item.source, start, stop), start, stop)
        return self._buffers.scratch("work", (stop - start, self._item.matrix[1]), self._buffers.spec.compute)


def _needs_base(operand: LoadedEdit) -> bool:
    """Return True if an edit's change depends on W."""
    return isinstance(operand, LoadedValues) or operand.edit.depends
