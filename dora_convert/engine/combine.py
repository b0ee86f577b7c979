"""Combine the changes that several edits make to one tensor: chains, and ΔWᵢ pruned, drawn, elected and added.

Thresholds of pruning need the whole tensor, so they are found in passes before the first row is written. Each pass
computes the same blocks with the same operations as the last one, so that all passes see the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import xxhash
from torch import Tensor

from ..maths import combine as maths
from ..maths.kth_largest import KthLargest
from ..option_table import COLLECTED, STRIP, Combination
from ..plan.item import Item
from .changes import LoadedValues, change_of, forget_norms, load_edit, refuse_infinite, scattered, wanted_rank
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit, apply_edits
from .tensor import SourceValues, measure


class Combiner:
    """Turns blocks of W into blocks of the combined result."""

    def __init__(self, item: Item, buffers: DeviceBuffers, values: SourceValues) -> None:
        """Read the edits, and find the norms and thresholds that need the whole tensor."""
        assert item.combination
        self._item, self._buffers, self._how = item, buffers, item.combination
        self.edits: Sequence[LoadedEdit] = [load_edit(edit, buffers) for edit in item.edits]
        self._keys = [_key(self._how, item.name, number) for number in range(len(self.edits))]
        self.cuts: tuple[tuple[float, int], ...] = ()
        self._prepare(values)

    def _prepare(self, values: SourceValues) -> None:
        if self._how.method == "chain":
            self._measure_chain(values)
            return
        factored = [operand for operand in self.edits if not isinstance(operand, LoadedValues)]
        measure(self._item, factored, values, self._buffers)
        if self._how.prunes:
            self.cuts = tuple(_Thresholds(self._item, self.edits, values, self._buffers).find())
        forget_norms(self.edits)

    def apply(self, W: Tensor, start: int, stop: int) -> Tensor:
        """Compute the result of all edits in place."""
        if self._how.method == "chain":
            for operand in self.edits:
                apply_edits(W, [operand], start, stop, self._buffers)
            return W
        deltas = [self._kept(number, W, start, stop) for number in range(len(self.edits))]
        return self._merge(W, deltas)

    def _merge(self, W: Tensor, deltas: Sequence[Tensor]) -> Tensor:
        """Add what is kept of all changes to W in place, or what the majority's sign leaves of it."""
        weights = [operand.edit.weight for operand in self.edits]
        if not self._how.elects:
            return maths.add_up_(W, deltas, weights)
        work, marks = self._work(min(STRIP, W.numel()))
        flat = [x.view(-1) for x in (W, *deltas)]
        for first in range(0, W.numel(), STRIP):
            piece, *others = (x[first : first + STRIP] for x in flat)
            used = slice(len(piece))
            maths.elect_(
                piece,
                others,
                weights,
                self._how.majority_sign,
                work=[x[used] for x in work],
                marks=[x[used] for x in marks],
            )
        return W

    def _work(self, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return scratch space for an election."""
        votes = torch.uint8 if len(self.edits) < 1 << 8 else torch.int32
        scratch, compute = self._buffers.scratch, self._buffers.spec.compute
        work = [scratch(f"elect {k}", (size,), compute) for k in range(2)]
        return work, [scratch("elect agrees", (size,), torch.bool), scratch("elect count", (size,), votes)]

    def change(self, number: int, W: Tensor, start: int, stop: int) -> Tensor:
        """Return the whole change of one edit, in memory that the next block reuses."""
        delta = self._buffers.scratch(f"delta {number}", W.shape, W.dtype)
        return change_of(self.edits[number], W, start, stop, out=delta)

    def _kept(self, number: int, W: Tensor, start: int, stop: int) -> Tensor:
        """Return what is kept of the change of one edit, in memory that the next block reuses."""
        delta = self.change(number, W, start, stop)
        if self._how.prunes:
            least, last = self.cuts[number]
            kept = maths.prune_(delta, least)
            return kept if last < 0 else maths.drop_equal_(kept, least, last + 1 - start * W.shape[1])
        if self._how.draws:
            density = self.edits[number].edit.density
            words = maths.random_words(self._keys[number], start, (stop - start, W.shape[1]), W.device)
            draw = maths.drop_by_rank_ if self._how.method == "della" else maths.drop_
            return draw(delta, words, density)
        return delta

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


def _key(how: Combination, name: str, number: int) -> int:
    """Return the key of the random numbers for one edit of a tensor."""
    return xxhash.xxh3_64_intdigest(f"{how.seed}/{number}/{name}".encode())


class _Thresholds:
    """Finds the least magnitude that each edit keeps."""

    def __init__(
        self, item: Item, operands: Sequence[LoadedEdit], values: SourceValues, buffers: DeviceBuffers
    ) -> None:
        self._item, self._operands, self._values, self._buffers = item, operands, values, buffers
        self._found = [
            KthLargest(*ranks, COLLECTED) if (ranks := wanted_rank(operand.edit, item)) else None
            for operand in operands
        ]

    def find(self) -> list[tuple[float, int]]:
        """Return the least magnitude for each edit, and the flat place of the last of its equals; −1 for all."""
        while pending := [number for number, found in enumerate(self._found) if found and not found.done]:
            self._pass(pending, self._add)
            for number in pending:
                self._search(number).finish()
        return [(found.value if found else 0.0, self._last_place(number)) for number, found in enumerate(self._found)]

    def _add(self, number: int, magnitudes: Tensor, _: int) -> None:
        """Show a block of magnitudes to the search of one edit's threshold."""
        single = self._buffers.scratch("single", magnitudes.shape, torch.float32)
        self._search(number).add(magnitudes, single)

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

        def count(_: int, magnitudes: Tensor, start: int) -> None:
            nonlocal left
            equal = (magnitudes == found.value).flatten().nonzero().flatten()
            if 0 < left <= len(equal):
                places.append(start * magnitudes.shape[1] + int(equal[left - 1]))
            left -= len(equal)

        self._pass([number], count, in_order=True)
        return places[0]

    def _pass(self, numbers: Sequence[int], see: Callable[[int, Tensor, int], None], *, in_order: bool = False) -> None:
        """Show the magnitudes of some edits' changes, block by block.

        Blocks come from all parts of the tensor in turn, and show only outputs that the edit changes; `in_order`,
        they come whole and from first to last.
        """
        reads = any(_needs_base(self._operands[number]) for number in numbers)
        for start, stop in self._item.spans() if in_order else scattered(self._item):
            W = self._block(start, stop, reads=reads)
            for number in numbers:
                operand = self._operands[number]
                delta = change_of(operand, W, start, stop, out=self._buffers.scratch("delta 0", W.shape, W.dtype))
                refuse_infinite(operand, self._item)
                magnitudes = delta.abs_()
                see(number, magnitudes if in_order else operand.own(magnitudes, start, stop), start)
            forget_norms(self._operands)

    def _block(self, start: int, stop: int, *, reads: bool) -> Tensor:
        """Return a block of W; its values do not matter if no edit reads them."""
        if reads:
            return self._values.block(self._buffers.raw(self._item.source, start, stop), start, stop)
        return self._buffers.scratch("work", (stop - start, self._item.matrix[1]), self._buffers.spec.compute)


def _needs_base(operand: LoadedEdit) -> bool:
    """Return True if an edit's change depends on W."""
    return isinstance(operand, LoadedValues) or operand.edit.depends
