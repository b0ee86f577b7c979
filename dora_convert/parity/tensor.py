"""Compare one tensor of a merged checkpoint with its definition: all elements, and sample outputs.

The first pass over the tensor counts the elements that differ from the rounded float64 result. The count
tells if the tool that wrote the tensor rounded once. A tool that rounds more often moves rows at random, and
not a whole module in one direction. The second pass measures how far the differing elements are off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..deferred_imports import seeded
from ..engine.precision import GRID, TORCH, half_ulp, nearest, read_rows
from ..plan.alike import kind_of
from ..plan.item import Item, are_apart
from ..reports.verify import CheckedModule
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .causes import find_cause
from .confirming import Confirmation
from .expected import Block, Expected
from .roundings import coarser
from .self_check import distance
from .stacks import CPU

FEWEST_ELEMENTS, MOST_ELEMENTS = 3 << 15, 1 << 18
"""Elements that are compared together on a processor, as memory allows: many workers wait for calls."""
ON_DEVICE = 1 << 21
"""The same for a device, which costs time for each step."""
ROUNDED_ONCE = 0.001
"""Largest share of elements off the rounded result after one rounding; float32 leaves a third of it."""
FEW = 2
"""So many elements off the rounded result prove nothing in a small tensor."""


class Outputs:
    """W'x for sample inputs x: as stored, by the adapter's own forward, and with perfect rounding."""

    def __init__(self, expected: Expected, samples: int, device: torch.device) -> None:
        self.expected, item = expected, expected.item
        self.transposed = any(edit.transposed for edit in item.edits)
        self.x = _inputs(max(item.matrix), samples).to(device)
        """(in, samples), enough for a weight stored as (in, out), too."""
        self.squares = [0.0, 0.0, 0.0]
        """Σ of the squares: error as stored, error with perfect rounding, and the outputs themselves."""
        self._sums: Sequence[Tensor] = ()

    def add(self, rows: Sequence[int], block: Block, got: Tensor, rounded: Tensor) -> None:
        """Add the outputs of some rows, as stored and rounded perfectly."""
        if not self.transposed:  # each row is an output
            x = self.x[: got.shape[1]]
            stored = got @ x
            perfect = stored if rounded is got else rounded @ x
            self.count(stored, perfect, self.expected.forward(rows, block, x, by_columns=False))
            return
        height = self.expected.item.matrix[0] // self.expected.item.experts  # each row adds to all outputs
        if rows[0] % height == 0:
            self.finish()
        x = self.x[[row % height for row in rows]]
        parts = [got.T @ x, rounded.T @ x, self.expected.forward(rows, block, x, by_columns=True)]
        self._sums = [a + b for a, b in zip(self._sums, parts, strict=True)] if self._sums else parts

    def finish(self) -> None:
        """Count the sums of a weight stored as (in, out)."""
        if self._sums:
            self.count(*self._sums)
            self._sums = ()

    def count(self, got: Tensor, rounded: Tensor, y: Tensor) -> None:
        """Count outputs as stored, with perfect rounding, and by the adapter's own forward."""
        sums = torch.stack([x.square().sum() for x in (got - y, rounded - y, y)]).tolist()  # one answer of a device
        self.squares = [total + each for total, each in zip(self.squares, sums, strict=True)]

    def relative(self) -> tuple[float | None, float | None]:
        """Return the relative errors as stored and with perfect rounding; None without outputs."""
        error, floor, size = self.squares
        return ((error / size) ** 0.5, (floor / size) ** 0.5) if size else (None, None)


@lru_cache(maxsize=1)
def _inputs(length: int, samples: int) -> Tensor:
    """Return random inputs, always the same; neighbouring tensors are often of one size."""
    return torch.randn(length, samples, generator=seeded(0), dtype=torch.float64)


def lengths_of(expected: Expected) -> list[Lengths]:
    """Return the lengths that each DoRA on its own outputs sets, or else the first DoRA."""
    edits = expected.item.edits
    numbers = [number for number, edit in enumerate(edits) if edit.divides]
    numbers = [] if expected.item.combination else numbers
    return [Lengths(expected, number) for number in (numbers if are_apart(edits) else numbers[:1])]


class Lengths:
    """The lengths of a DoRA's rows, or columns, as written and by definition."""

    def __init__(self, expected: Expected, number: int) -> None:
        edits, self._number = expected.item.edits, number
        self._axis, m = edits[number].axis, expected.m[number]
        assert m is not None
        self._numbers = torch.stack([m, *torch.zeros(4, len(m), dtype=m.dtype, device=m.device)])
        """For each row or column: m, n, m/n, and the sums of error·x and of x²."""
        self._own = slice(*edits[number].outputs or (0, len(m)))
        self._grid = coarser(edits[number], expected.item.dtype)
        self._weight = abs(edits[number].weight) if are_apart(edits) else sum(abs(edit.weight) for edit in edits)

    def add(self, rows: Sequence[int], block: Block, got: Tensor) -> None:
        """Add some rows that differ from the rounded result."""
        part = block.parts[self._number]
        assert part.n is not None
        numbers = self._numbers[:, rows[0] : rows[-1] + 1] if self._axis else self._numbers
        numbers[1], numbers[2] = part.n.flatten(), part.f.flatten()
        numbers[3] += ((got.double() - block.x) * block.x).sum(self._axis)
        numbers[4] += block.x.square().sum(self._axis)

    def biased(self) -> bool:
        """Return True if rows are longer, or shorter, on average than roundings of m, n and m/n make them.

        The roundings of k different numbers are independent: their mean is k**-½ of one.
        """
        own = self._numbers[:, self._own]
        numbers = own[:, own[4] > 0]
        if not numbers.numel():
            return False
        one = 2.0 ** -GRID[self._grid][0]
        eighths = (numbers[:3] / (half_ulp(numbers[:3].contiguous(), self._grid) / 4)).round()
        granted = sum(min(1.0, 2 * len(each.unique()) ** -0.5) for each in eighths)
        mean = float((numbers[3] / numbers[4]).mean())
        return bool(abs(mean) > self._weight * one * granted)


def compare_all(
    item: Item, written: StoredTensor, reader: Reader, samples: int, device: torch.device = CPU, elements: int = 0
) -> CheckedModule:
    """Compare every element of a tensor, in the stored dtype, and the outputs for some random inputs.

    So many elements are compared together: FEWEST_ELEMENTS unless given.
    """
    item = replace(item, dtype=written.dtype)
    written = replace(written, shape=item.stacked)
    expected = _definition(item, reader, device)
    outputs = Outputs(expected, samples if item.changed and len(item.shape) > 1 else 0, device)
    differing, total, lengths = [], 0, lengths_of(expected)
    for rows in _unconfirmed(outputs, written, reader, elements or FEWEST_ELEMENTS):
        block, raw = expected.block(rows), read_rows(reader, written, rows).to(device)
        if off := count_off(block.x, raw, item.dtype):
            differing.append(rows)
            total += off
            for each in lengths:
                each.add(rows, block, raw)
        if outputs.x.numel():
            got = raw.double()
            outputs.add(rows, block, got, nearest(block.x, item.dtype) if off else got)
    outputs.finish()
    once, number, most = total <= max(FEW, ROUNDED_ONCE * written.numel) or any(each.biased() for each in lengths), 0, 0
    experts = set[int]()
    for rows in differing:
        got = read_rows(reader, written, rows).to(device).double()
        wrong, ulp = distance(got, expected, rows, rounded_once=once)
        number, most = number + wrong, max(most, ulp)
        experts |= {rows[0] * item.experts // item.matrix[0]} if wrong else set()
    error, floor = outputs.relative()
    return CheckedModule(
        name=item.name,
        elements=written.numel,
        wrong_elements=number,
        max_ulp=most,
        output_error=error,
        output_floor=floor,
        cause=find_cause(expected, written, reader, sorted(experts)) if number and item.changed else None,
    )


def _unconfirmed(outputs: Outputs, written: StoredTensor, reader: Reader, elements: int) -> Iterator[Sequence[int]]:
    """Yield all rows in chunks, but for those that are quickly confirmed: these are counted here."""
    expected = outputs.expected
    item, device = expected.item, expected.device
    chunks = expected.chunks(range(item.matrix[0] + item.grown), elements)
    if device.type != "cpu" or not kind_of(item):
        yield from chunks
        return
    quick = Confirmation(item, written, reader, outputs.x)
    yield from (rows for rows in chunks if not (isinstance(rows, range) and quick.confirms(rows)))
    if outputs.x.numel():
        stored, y = quick.outputs
        outputs.count(stored, stored, y)


def _definition(item: Item, reader: Reader, device: torch.device) -> Expected:
    """Return the definition of an item's result."""
    if not item.combination:
        return Expected(item, reader, device)
    from .combined import expected_of

    return expected_of(item, reader, device)


def count_off(x: Tensor, got: Tensor, dtype: str) -> int:
    """Count the elements that are not x rounded once.

    torch rounds float64 to half precision in two steps, which is fast and nearly always right. The few
    elements whose first step lands on a tie of the second step are compared again.
    """
    if dtype not in ("BF16", "F32"):
        return int((got.double() != nearest(x, dtype)).sum())
    single = x.float()
    doubtful = single.to(TORCH[dtype]) != got
    if dtype == "BF16":
        doubtful |= single.view(torch.int16)[..., ::2] == torch.iinfo(torch.int16).min
    if not doubtful.any():
        return 0
    return int((got[doubtful].double() != nearest(x[doubtful], dtype)).sum())
