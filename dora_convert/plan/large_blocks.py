"""Cut a plan's tensors into larger blocks, for devices that cost time for each step and not for each element."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import islice
from typing import ClassVar

from ..records import record
from ..storage.reader import block_height
from .item import Item
from .plan import Plan

RING = 4
"""Blocks of a tensor that are in host memory at once: one is finished, one computed, two are read ahead."""
TEMPORARY = 16
"""Bytes an element that rounding, and the search for NaN, take on a device for a moment."""
CHECKING = 3 << 20
"""Bytes that the self-check takes at least."""


@record(frozen=True)
class LargeItem(Item):
    """One output tensor in large blocks, whose left factors stay on the device from the first block to the last.

    The size is the same for all devices: bytes must not depend on a card or on its memory.
    """

    block_elements: ClassVar[int] = 1 << 23

    def cost(self, width: int, *, exact: bool = False) -> int:
        """Return the bytes that a worker holds, in host memory and on the device together."""
        rows, columns = self.matrix
        height = block_height(max(rows // self.experts, self.grown), columns, elements=self.block_elements)
        element = max(tensor.itemsize for tensor in (self.source, self.base) if tensor)
        ahead = len(list(islice(self.spans(), RING)))
        staged = height * columns * (ahead * element + 3 * element + TEMPORARY) + CHECKING
        return super().cost(width, exact=exact) + staged + sum(map(self._left_cost, range(len(self.edits))))

    def _left_cost(self, number: int) -> int:
        """Return the bytes of an edit's left factor, read and in float64, for all rows."""
        edit = self.edits[number]
        if not edit.low:
            return 0
        rows = math.prod(edit.low.inputs) if edit.transposed else edit.low.outputs
        return edit.low.rank * rows * (2 * 8 + edit.low.B.itemsize) * max(1, edit.low.blocks[0])


def in_large_blocks(plan: Plan) -> Plan:
    """Return a plan with large blocks; tensors that are decoded, or coded again, keep theirs."""
    shards = (replace(shard, items=tuple(map(_enlarged, shard.items))) for shard in plan.shards)
    return replace(plan, shards=tuple(shards))


def _enlarged(item: Item) -> Item:
    if item.verbatim or item.parts or item.part_of or item.source.coded or item.source.is_view:
        return item
    return LargeItem(**{field.name: getattr(item, field.name) for field in fields(item)})
