"""Make a pruned tensor in one pass: hold the result, and the few elements that thresholds may yet keep or drop.

A look at the tensor in float32 tells about where each threshold is. Then every block is computed once. Elements above a
change's interval are kept, those below are dropped. Those inside wait until the threshold is known. If too many wait,
or the threshold is not inside, nothing has been written, and the caller searches for thresholds first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..maths import combine as maths
from ..maths.interval import Found, Interval, nonzero_places
from ..option_table import STRIP, WAITING
from ..plan.item import Item
from .changes import RESULT, change_of, load_edit, wanted_rank
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit
from .precision import TORCH
from .tensor import SourceValues

Merge = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""Adds pruned changes, which are overwritten, to a block of W in place."""
Blocks = Iterable[tuple[int, Tensor, Sequence[Tensor]]]
"""The first row of each block, W, and all changes of it."""


def estimate(item: Item, buffers: DeviceBuffers, operands: Sequence[LoadedEdit]) -> list[Interval | None] | None:
    """Return about where the threshold of each change is, None for one that is kept whole; None if nobody knows."""
    ranks = [wanted_rank(operand.edit, item) for operand in operands]
    intervals = [Interval(*each) if each else None for each in ranks]
    single = buffers.single()
    edits = [load_edit(operand.edit, single) for operand in operands]
    for edit, operand in zip(edits, operands, strict=True):
        edit.n = [n.float() for n in operand.n]
    for number, interval in enumerate(intervals):
        if interval:
            interval.begin(single.scratch(f"sample {number}", (interval.most,), torch.float32))
    values = SourceValues(item, single)
    for start, stop in item.spans():
        W = values.block(single.raw(item.source, start, stop), start, stop)
        for edit, interval in zip(edits, intervals, strict=True):
            if interval:
                change = change_of(edit, W, start, stop, out=single.scratch("delta", W.shape, W.dtype))
                interval.look(edit.own(change, start, stop))
                if not edit.edit.two_passes:
                    edit.n.clear()
    chosen = [interval.choose() for interval in intervals if interval]
    single.release()
    return intervals if all(chosen) else None


class Waiting:
    """Elements whose thresholds are not known yet, in memory of a fixed size."""

    def __init__(self, buffers: DeviceBuffers, changes: int) -> None:
        compute = buffers.spec.compute
        self._places = buffers.scratch("waiting places", (WAITING,), torch.int64)
        self._numbers = [buffers.scratch(f"waiting {k}", (WAITING,), compute) for k in range(changes + 1)]
        self.count = 0

    def add(self, places: Tensor, first: int, numbers: Sequence[Tensor]) -> bool:
        """Add elements of some rows: W, and each change; return False if there are too many."""
        start, self.count = self.count, self.count + len(places)
        if self.count > WAITING:
            return False
        torch.add(places, first, out=self._places[start : self.count])
        for rows, held in zip(numbers, self._numbers, strict=True):
            torch.index_select(rows.reshape(-1), 0, places, out=held[start : self.count])
        return True

    @property
    def all(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Flat places in the tensor, W, and each change."""
        W, *changes = (numbers[: self.count] for numbers in self._numbers)
        return self._places[: self.count], W, changes


class OnePass:
    """Computes one tensor whole, in the output's dtype and in host memory."""

    def __init__(self, item: Item, buffers: DeviceBuffers, intervals: Sequence[Interval | None], merge: Merge) -> None:
        self._buffers, self._intervals, self._merge = buffers, intervals, merge
        self._waiting = Waiting(buffers, len(intervals))
        self.result = buffers.scratch(RESULT, item.matrix, TORCH[item.dtype], on_host=True)
        self.cuts: tuple[tuple[float, int], ...] = ()
        """The least magnitude kept of each change, and the flat place of the last kept equal; −1 for all."""

    def make(self, blocks: Blocks) -> bool:
        """Compute the result; return False if thresholds must be searched for first."""
        for start, W, changes in blocks:
            if not self._add(start, W, changes):
                return False
        return self._settle()

    def _add(self, start: int, W: Tensor, changes: Sequence[Tensor]) -> bool:
        """Compute a block of the result, as if no waiting element were kept; return False if too many wait."""
        columns = W.shape[1]
        height = max(1, STRIP // columns) if W.device.type == "cpu" else len(W)
        work = self._work((min(height, len(W)), columns), W.dtype)
        for first in range(0, len(W), height):
            strip = slice(first, min(first + height, len(W)))
            used = slice(strip.stop - first)
            parts = [change[strip] for change in changes]
            if not self._add_strip((start + first) * columns, W[strip], parts, [each[used] for each in work]):
                return False
        self.result[start : start + len(W)] = self._buffers.land(W, self.result.dtype)
        return True

    def _work(self, shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
        """Return scratch space for a strip: three of flags, one of numbers, and one for each change."""
        numbers = ("", *range(len(self._intervals)))
        flags = [self._buffers.scratch(f"strip {name}", shape, torch.bool) for name in ("kept", "reached", "waits")]
        return flags + [self._buffers.scratch(f"strip {number}", shape, dtype) for number in numbers]

    def _add_strip(self, place: int, W: Tensor, changes: Sequence[Tensor], scratch: Sequence[Tensor]) -> bool:
        """Compute some rows of a block in place; `place` is that of the first element."""
        kept, reached, waits, work, *pruned = scratch
        waits.zero_()
        for interval, change, own in zip(self._intervals, changes, pruned, strict=True):
            if interval:
                kept.copy_(maths.above_(own, change, interval.high))
                interval.above += int(torch.count_nonzero(kept))
                reached.copy_(maths.above_(work, change, maths.before(interval.low)))
                waits.bitwise_or_(reached.bitwise_xor_(kept))
            else:
                own.copy_(change)
        fits = self._waiting.add(nonzero_places(waits), place, (W, *changes))
        self._merge(W, pruned)
        return fits

    def _settle(self) -> bool:
        """Find the thresholds, and write the elements that have waited for them."""
        places, W, changes = self._waiting.all
        cuts = []
        for interval, change in zip(self._intervals, changes, strict=True):
            magnitudes = change.abs()
            found = interval.settle(magnitudes[interval.holds(magnitudes)]) if interval else None
            if interval and not found:
                return False
            cuts.append((found.value, _last_place(found, magnitudes, places)) if found else (0.0, -1))
        self.cuts = tuple(cuts)
        for change, (least, last) in zip(changes, cuts, strict=True):
            maths.prune_(change, least)
            if last >= 0:
                change[(change.abs() == least) & (places > last)] = 0.0
        merged = self._merge(W, changes).view(1, -1)
        self.result.view(-1)[places.cpu()] = self._buffers.land(merged, self.result.dtype).view(-1)
        return True


def _last_place(found: Found, magnitudes: Tensor, places: Tensor) -> int:
    """Return the flat place of the last kept element that equals the threshold; −1 if all such are kept."""
    if found.wanted == found.equal:
        return -1
    return int(places[magnitudes == found.value].sort().values[found.wanted - 1])
