"""Compare one tensor of a merged checkpoint with its definition: all elements, and sample outputs.

The first pass over the tensor counts the elements that differ from the rounded float64 result. The count
tells how often the tool that wrote the tensor rounded. The second pass measures how far the differing
elements are off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..engine.host_memory import read_rows
from ..engine.precision import TORCH, nearest
from ..plan.item import Item
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .expected import CPU, Expected
from .self_check import distance, rounded_once

ROWS_ELEMENTS = 3 << 15
SUSPECTS = 256
"""Wrong rows that are kept to find the cause."""


@dataclass
class Outputs:
    """W'x for sample inputs x: as stored, by the adapter's own forward, and with perfect rounding."""

    samples: int
    error: float = 0.0
    floor: float = 0.0
    size: float = 0.0
    _sums: list[Tensor] = field(default_factory=list)

    def rows(self, got: Tensor, rounded: Tensor, y: Tensor, x: Tensor) -> None:
        """Add rows of a weight stored as (out, in): each row is an output."""
        outputs = got @ x
        self._add(outputs, outputs if rounded is got else rounded @ x, y)

    def columns(self, got: Tensor, rounded: Tensor, y: Tensor, x: Tensor) -> None:
        """Add rows of a weight stored as (in, out): each row adds to all outputs."""
        parts = [got.T @ x, rounded.T @ x, y]
        self._sums = [a + b for a, b in zip(self._sums, parts, strict=True)] if self._sums else parts

    def finish(self) -> None:
        """Count the sums of `columns`."""
        if self._sums:
            self._add(*self._sums)
            self._sums = []

    def _add(self, got: Tensor, rounded: Tensor, y: Tensor) -> None:
        self.error += float((got - y).square().sum())
        self.floor += float((rounded - y).square().sum())
        self.size += float(y.square().sum())


@dataclass
class Parity:
    """The result of a comparison of one tensor."""

    item: Item
    elements: int = 0
    off: int = 0
    """Elements that are not the rounded float64 result."""
    wrong: int = 0
    """Elements that no honest rounding explains."""
    max_ulp: int = 0
    outputs: Outputs = field(default_factory=lambda: Outputs(0))
    suspects: list[int] = field(default_factory=list)
    """Some of the rows that hold wrong elements."""

    @property
    def output_error(self) -> float | None:
        """Relative error of the outputs; None without outputs."""
        return (self.outputs.error / self.outputs.size) ** 0.5 if self.outputs.size else None

    @property
    def output_floor(self) -> float | None:
        """Relative error of the outputs of perfectly rounded weights; None without outputs."""
        return (self.outputs.floor / self.outputs.size) ** 0.5 if self.outputs.size else None


def compare_all(item: Item, written: StoredTensor, reader: Reader, samples: int, device: torch.device = CPU) -> Parity:
    """Compare every element of a tensor, in the stored dtype, and the outputs for some random inputs."""
    item = replace(item, dtype=written.dtype)
    written = replace(written, shape=item.stacked)
    samples = samples if item.changed and len(item.shape) > 1 else 0
    expected = Expected(item, reader, device)
    parity = Parity(item, outputs=Outputs(samples))
    x = _inputs(item, samples).to(device)
    differing: list[Sequence[int]] = []
    for rows in chunks(item):
        block, raw = expected.block(rows), read_rows(reader, written, rows).to(device)
        off = count_off(block.x, raw, item.dtype)
        parity.elements += raw.numel()
        if off:
            differing.append(rows)
            parity.off += off
        if samples:
            got = raw.double()
            rounded = nearest(block.x, item.dtype) if off else got
            forward = partial(expected.forward, rows, block)
            _add_outputs(parity, rows, (got, rounded), x, forward)
    parity.outputs.finish()
    once = rounded_once(parity.off, parity.elements)
    for suspicious in differing:
        got = read_rows(reader, written, suspicious).to(device).double()
        wrong, ulp = distance(got, expected, suspicious, rounded_once=once)
        parity.wrong += int(wrong.sum())
        parity.max_ulp = max(parity.max_ulp, ulp)
        if len(parity.suspects) < SUSPECTS:
            parity.suspects += [suspicious[k] for k in wrong.any(dim=1).nonzero().flatten().tolist()]
    return parity


def chunks(item: Item) -> Iterator[range]:
    """Yield all rows in chunks of bounded size; no chunk holds rows of two experts."""
    total, columns = item.matrix[0] + item.grown, item.matrix[1]
    part = max(1, total // item.experts)
    height = max(1, ROWS_ELEMENTS // max(1, columns))
    for first in range(0, total, part):
        for start in range(first, first + part, height):
            yield range(start, min(start + height, first + part))


def _inputs(item: Item, samples: int) -> Tensor:
    """Return random inputs of a layer, (in, samples), enough for a weight stored as (in, out), too."""
    generator = torch.Generator().manual_seed(0)
    size = max(item.source.matrix) if samples else 0
    return torch.randn(size, samples, generator=generator, dtype=torch.float64)


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


def _add_outputs(
    parity: Parity, rows: Sequence[int], weights: tuple[Tensor, Tensor], x: Tensor, forward: Callable[..., Tensor]
) -> None:
    """Add the outputs of some rows for inputs x; `weights` are these rows as stored, and rounded perfectly."""
    item, outputs = parity.item, parity.outputs
    if any(edit.transposed for edit in item.edits):
        height = item.source.matrix[0] // item.experts
        if rows[0] % height == 0:
            outputs.finish()
        inside = [row % height for row in rows]
        outputs.columns(*weights, forward(x[inside], by_columns=True), x[inside])
    else:
        x = x[: weights[0].shape[1]]
        outputs.rows(*weights, forward(x, by_columns=False), x)
