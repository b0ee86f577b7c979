"""Compare one tensor of a merged checkpoint with its definition: all elements, and sample outputs.

The first pass over the tensor counts the elements that differ from the rounded float64 result. The count
tells how often the tool that wrote the tensor rounded. The second pass measures how far the differing
elements are off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..engine.host_memory import read_rows
from ..engine.precision import TORCH, nearest
from ..plan.item import Item
from ..reports.verify import CheckedModule
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .causes import find_cause
from .expected import CPU, Block, Expected
from .self_check import distance, rounded_once

CHUNK_ELEMENTS = 3 << 15
SUSPECTS = 256
"""Wrong rows that are kept to find the cause."""


class Outputs:
    """W'x for sample inputs x: as stored, by the adapter's own forward, and with perfect rounding."""

    def __init__(self, expected: Expected, samples: int, device: torch.device) -> None:
        self.expected, item = expected, expected.item
        self.transposed = any(edit.transposed for edit in item.edits)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(max(item.matrix), samples, generator=generator, dtype=torch.float64).to(device)
        """(in, samples), enough for a weight stored as (in, out), too."""
        self.squares = [0.0, 0.0, 0.0]
        """Σ of the squares: error as stored, error with perfect rounding, and the outputs themselves."""
        self._sums: Sequence[Tensor] = ()

    def add(self, rows: Sequence[int], block: Block, got: Tensor, rounded: Tensor) -> None:
        """Add the outputs of some rows, as stored and rounded perfectly."""
        if not self.transposed:  # each row is an output
            x = self.x[: got.shape[1]]
            self._count(got @ x, rounded @ x, self.expected.forward(rows, block, x, by_columns=False))
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
            self._count(*self._sums)
            self._sums = ()

    def _count(self, got: Tensor, rounded: Tensor, y: Tensor) -> None:
        for number, x in enumerate((got - y, rounded - y, y)):
            self.squares[number] += float(x.square().sum())

    def relative(self) -> tuple[float | None, float | None]:
        """Return the relative errors as stored and with perfect rounding; None without outputs."""
        error, floor, size = self.squares
        return ((error / size) ** 0.5, (floor / size) ** 0.5) if size else (None, None)


def compare_all(
    item: Item, written: StoredTensor, reader: Reader, samples: int, device: torch.device = CPU
) -> CheckedModule:
    """Compare every element of a tensor, in the stored dtype, and the outputs for some random inputs."""
    item = replace(item, dtype=written.dtype)
    written = replace(written, shape=item.stacked)
    expected = Expected(item, reader, device)
    outputs = Outputs(expected, samples if item.changed and len(item.shape) > 1 else 0, device)
    differing, total = [], 0
    for rows in expected.chunks(range(item.matrix[0] + item.grown), CHUNK_ELEMENTS):
        block, raw = expected.block(rows), read_rows(reader, written, rows).to(device)
        if off := count_off(block.x, raw, item.dtype):
            differing.append(rows)
            total += off
        if outputs.x.numel():
            got = raw.double()
            outputs.add(rows, block, got, nearest(block.x, item.dtype) if off else got)
    outputs.finish()
    once, number, most, suspects = rounded_once(total, written.numel), 0, 0, list[int]()
    for rows in differing:
        got = read_rows(reader, written, rows).to(device).double()
        wrong, ulp = distance(got, expected, rows, rounded_once=once)
        number, most = number + int(wrong.sum()), max(most, ulp)
        if len(suspects) < SUSPECTS:
            suspects += [rows[k] for k in wrong.any(dim=1).nonzero().flatten().tolist()]
    error, floor = outputs.relative()
    return CheckedModule(
        name=item.name,
        elements=written.numel,
        wrong_elements=number,
        max_ulp=most,
        output_error=error,
        output_floor=floor,
        cause=find_cause(item, written, suspects, reader) if number and item.changed else None,
    )


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
