"""Compute the change ΔW of one edit, as those who combine changes need it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..adapters import Full
from ..errors import NumericalError
from ..maths import combine as maths
from ..maths import lora
from ..option_table import piece_height
from ..plan.item import Edit, Item
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit

GOLDEN = (5**0.5 - 1) / 2
PARTS = 32
"""The least number of parts of a tensor that a sample is taken from."""
SAMPLED = 64
"""A sample has one of so many rows."""


@dataclass
class LoadedValues(LoadedEdit):
    """An edit whose result is stored whole: a saved module, or a fine-tuned checkpoint's tensor."""

    buffers: DeviceBuffers | None = None

    def change_(self, out: Tensor, W: Tensor, start: int, stop: int) -> None:
        """Compute value − W."""
        assert self.buffers
        assert isinstance(self.edit.update, Full)
        out.copy_(self.buffers.raw(self.edit.update.value, start, stop, "factor")).sub_(W)


def load_edit(edit: Edit, buffers: DeviceBuffers) -> LoadedEdit:
    """Read the tensors that every block of one edit needs."""
    return LoadedValues(edit, buffers=buffers) if isinstance(edit.update, Full) else LoadedEdit.load(edit, buffers)


def forget_norms(operands: Iterable[LoadedEdit]) -> None:
    """Remove the norms of rows that a pass has computed; the last pass computes them again."""
    for operand in operands:
        if not operand.edit.two_passes:
            operand.n.clear()


def scattered(item: Item) -> Iterator[tuple[int, int]]:
    """Yield the blocks of rows from all parts of the tensor in turn."""
    spans = list(item.spans())
    return (spans[k] for k in sorted(range(len(spans)), key=lambda k: k * GOLDEN % 1))


def sampled(item: Item) -> list[tuple[int, int]]:
    """Return a few rows from each part of the tensor; all rows of one block, if single rows are costly to read."""
    spans = list(item.spans())
    if item.source.coded or item.source.is_view:
        return spans[:1]
    parts, found = math.ceil(PARTS / max(1, len(spans))), list[tuple[int, int]]()
    for start, stop in spans:
        edges = [start + (stop - start) * part // parts for part in range(parts + 1)]
        for first, last in pairwise(edges):
            height = min(last - first, max(1, (last - first) // SAMPLED))
            place = first + int(len(found) * GOLDEN % 1 * (last - first - height + 1))
            found += [(place, place + height)] if height else []
    return found


def refuse_infinite(operand: LoadedEdit, item: Item, n: Tensor | None = None) -> None:
    """Raise NumericalError if some norms, or the last ones of an edit, are not finite."""
    if not (operand.is_finite() if n is None else lora.all_finite(n)):
        raise NumericalError(
            f"{item.name}: a change of it is NaN or infinite.",
            hint="is this the base that the adapters were trained on?",
        )


def change_of(operand: LoadedEdit, W: Tensor, start: int, stop: int, *, out: Tensor) -> Tensor:
    """Compute ΔW = apply(W) − W of one edit for a block."""
    if isinstance(operand, LoadedValues):
        operand.change_(out, W, start, stop)
    elif operand.known is not None:
        _low_rank_change(operand, W, start, stop, out)
    elif not operand.edit.depends:
        operand.add_(out.zero_(), start, stop)
    else:
        operand.apply_(out.copy_(W), start, stop).sub_(W)
    return out


def _low_rank_change(operand: LoadedEdit, W: Tensor, start: int, stop: int, out: Tensor) -> None:
    """Compute ΔW = (f − 1)·W + s·f·BA with f = m/‖V‖: as the norms are known, V is not needed."""
    low, factors = operand.edit.low, operand.factors
    assert low
    assert factors
    assert operand.m is not None
    assert operand.known is not None
    n = operand.known[start:stop]
    f = (operand.m[start:stop] / n).unsqueeze(1)
    lora.add_low_rank_(torch.mul(W, f - 1, out=out), factors.left(start, stop) * f, factors.right(start), low.scale)
    operand.n.append(n)


def pieces(item: Item, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the rows whose changes are computed together: parts of a block, which stay in a processor's cache.

    Products have other bits at other heights, so pieces depend on shapes alone.
    """
    height = stop - start if item.block_elements else piece_height(item.matrix[1])
    return [(first, min(first + height, stop)) for first in range(start, stop, max(1, height))]


def hold_factors(operands: Iterable[LoadedEdit], start: int, stop: int) -> None:
    """Read the factors' rows of a block at once, which are used in pieces."""
    for operand in operands:
        if operand.factors and not operand.edit.outputs:
            operand.factors.hold(start, stop)


def wanted_rank(edit: Edit, item: Item) -> tuple[int, int] | None:
    """Return k and n: an edit keeps the k largest of n elements; None if it keeps all."""
    count = own_elements(edit, item)
    return (maths.kept_count(edit.density, count), count) if edit.density < 1 else None


def own_elements(edit: Edit, item: Item) -> int:
    """Return the number of elements that an edit may change: PEFT prunes a module's own change."""
    rows, columns = item.matrix
    if not edit.outputs:
        return rows * columns
    count = edit.outputs[1] - edit.outputs[0]
    return count * (rows if edit.by_columns else columns)
