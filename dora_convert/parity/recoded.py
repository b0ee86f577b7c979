"""Compare a weight that was coded again with its definition: each element is within half a step of its codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..codecs.coded import CodedTensor
from ..output.finished import Verdict
from ..plan.item import Item
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .coded_values import CodedValues
from .expected import Block, Expected


class OutputSums(Protocol):
    """Adds up outputs of a weight, as stored and by definition."""

    x: Tensor

    def add(self, rows: Sequence[int], block: Block, got: Tensor, rounded: Tensor) -> None:
        """Add the outputs of some rows."""

    def finish(self) -> None:
        """Count the last sums."""


SLACK = 1 + 2.0**-20
"""Times half a step: the ends of a block's range are rounded, too."""


def as_written(item: Item, written: Callable[[str], StoredTensor]) -> CodedTensor:
    """Return an item's weight as its parts were written; parts that did not change were copied."""
    source = item.source
    assert isinstance(source, CodedTensor)
    parts = {role: written(part.name) for role, part in source.parts.items()}
    return replace(source, path=parts["codes"].path, start=parts["codes"].start, parts=parts)


def compare_coded(
    written: StoredTensor, expected: Expected, rows: Sequence[int], reader: Reader, outputs: OutputSums | None = None
) -> Verdict:
    """Count the elements of some rows that are farther off than half a step, and measure the loss of coding."""
    total, decoder = Verdict(), CodedValues(written, reader)
    for chunk in expected.chunks(rows):
        x, base = (each.cpu() for each in expected.rows(chunk))
        got, halves = decoder.with_steps(chunk, x)
        if outputs and outputs.x.numel():
            device = outputs.x.device
            outputs.add(chunk, expected.block(chunk), got.to(device), got.to(device))
        bound, off = halves * SLACK + 2.0**-22 * x.abs(), got - x
        total += Verdict(
            checked=x.numel(),
            wrong=x.numel() - int((off.abs() <= bound).sum()),
            rounding=float(torch.linalg.vector_norm(off).square()),
            change=float(torch.linalg.vector_norm(x - base).square()),
        )
    if outputs:
        outputs.finish()
    return total
