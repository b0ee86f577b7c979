"""Compare rows of weights that one plain LoRA or DoRA changes: rows of several such weights of a shape at once.

Most weights are such, and small ones cost more for calls than for numbers. So their rows lie in one stack:
(weights, rows, columns). A stack only tells of which weights every element is the float64 result, rounded to
nearest. `parity.expected` looks at the others, and measures how far they are off.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Decomposed, LowRank
from ..engine.precision import TORCH, half_ulp
from ..output.finished import Verdict
from ..plan.alike import kind_of
from ..plan.item import Item
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor

ReadStack = Callable[..., Tensor]
"""Reads some rows of each of several tensors, or all."""
CPU = torch.device("cpu")
SMALL_BYTES = 1 << 19
"""A tensor up to this size is read whole if some rows are asked for: a call of the system costs as much."""


class SampledRows(NamedTuple):
    """A planned weight, its tensor as it was written, and the rows to compare."""

    item: Item
    written: StoredTensor
    rows: Sequence[int]

    def only(self, part: slice) -> SampledRows:
        """Return the weight with some of the rows."""
        return SampledRows(self.item, self.written, self.rows[part])

    @property
    def low(self) -> LowRank:
        """The low-rank part of the only edit."""
        low = self.item.edits[0].low
        assert low
        return low


def verdicts_on_right(
    pairs: Sequence[SampledRows], reader: Reader, device: torch.device, elements: int
) -> dict[str, Verdict]:
    """Return the verdicts, by name, on plain weights whose compared elements are all the rounded result.

    So many `elements` of rows are computed together.
    """
    stacks: dict[object, list[SampledRows]] = defaultdict(list)
    for pair in pairs:
        as_planned = (pair.written.dtype, pair.written.shape) == (pair.item.dtype, pair.item.shape)
        if as_planned and (kind := kind_of(pair.item)):
            stacks[kind, len(pair.rows)].append(pair)
    return {
        pair.item.name: verdict
        for alike in stacks.values()
        for pair, verdict in zip(alike, Stack(alike, reader, device, elements).verdicts(), strict=True)
        if verdict
    }


@dataclass(frozen=True)
class Stack:
    """Weights of one kind, with as many rows of each."""

    pairs: Sequence[SampledRows]
    reader: Reader
    device: torch.device
    elements: int
    """Elements of rows that are computed together."""

    def verdicts(self) -> Iterator[Verdict | None]:
        """Yield the verdict on each weight whose elements are all the rounded result; None for the others."""
        rows, columns = len(self.pairs[0].rows), self.pairs[0].item.matrix[1]
        together = max(1, self.elements // (columns * max(rows, self.pairs[0].low.rank)))
        for first in range(0, len(self.pairs), together):
            yield from self._of(self.pairs[first : first + together], rows, columns)

    def _of(self, pairs: Sequence[SampledRows], rows: int, columns: int) -> Iterator[Verdict | None]:
        """Yield the verdicts on some weights, whose factors are held."""
        factors = StackedFactors.load(pairs, partial(read_stack, self.reader, self.device))
        height = max(1, self.elements // columns)
        parts = [slice(first, first + height) for first in range(0, rows, height)]
        facts = torch.stack([self._facts([pair.only(part) for pair in pairs], factors) for part in parts])
        sums, excess = facts[:, :2].sum(0), facts[:, 2].amin(0)
        for change, rounding, least in torch.stack([*sums, excess], dim=1).tolist():
            yield Verdict(rows * columns, change=change, rounding=rounding) if least > 0 else None

    def _facts(self, pairs: Sequence[SampledRows], factors: StackedFactors) -> Tensor:
        """Return three facts on each weight: Σ (x − W)², Σ (got − x)², and the least of ½ulp(x) − |got − x|.

        If the last is positive, every element is the value nearest to x. NaN is not positive, nor is a tie.
        """
        rows = [pair.rows for pair in pairs]
        W = read_stack(self.reader, self.device, [pair.item.source for pair in pairs], rows)
        x = factors.result(W, rows)
        off = read_stack(self.reader, self.device, [pair.written for pair in pairs], rows).sub_(x)
        sums = [torch.linalg.vector_norm(each, dim=(1, 2)).square_() for each in (W.sub_(x), off)]
        return torch.stack([*sums, half_ulp(x, pairs[0].item.dtype).sub_(off.abs_()).amin(dim=(1, 2))])


@dataclass(frozen=True)
class StackedFactors:
    """The factors of some weights, with the magnitudes of DoRAs."""

    left: Sequence[StoredTensor]
    right: Tensor  # (weights, r, columns), s·A
    m: Tensor | None  # (weights, outputs)
    read: ReadStack

    @classmethod
    def load(cls, pairs: Sequence[SampledRows], read: ReadStack) -> StackedFactors:
        """Read the tensors that all rows need."""
        right = read([pair.low.A for pair in pairs])
        scales = torch.tensor([pair.low.scale for pair in pairs], dtype=right.dtype, device=right.device)
        updates = [pair.item.edits[0].update for pair in pairs]
        decomposed = [update for update in updates if isinstance(update, Decomposed)]
        m = read([update.m for update in decomposed]).flatten(1) if decomposed else None
        if m is not None:
            m += torch.tensor([update.offset for update in decomposed], dtype=m.dtype, device=m.device)[:, None]
        return cls([pair.low.B for pair in pairs], right.mul_(scales[:, None, None]), m, read)

    def result(self, W: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return x of some rows: W + s·BA, or m times it over its norm."""
        V = torch.baddbmm(W, self.read(self.left, rows), self.right)
        if self.m is None:
            return V
        m = self.m.gather(1, torch.tensor(rows, device=V.device))
        return V.mul_((m / torch.linalg.vecdot(V, V).sqrt_()).unsqueeze(2))


def read_stack(
    reader: Reader, device: torch.device, tensors: Sequence[StoredTensor], rows: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Read some rows of each of several tensors of one shape, or all: (tensors, rows, columns) in float64."""
    few = rows is not None and tensors[0].nbytes <= SMALL_BYTES
    return (_pick(reader, tensors, rows or ()) if few else _read(reader, tensors, rows)).to(device).double()


def _pick(reader: Reader, tensors: Sequence[StoredTensor], rows: Sequence[Sequence[int]]) -> Tensor:
    """Read small tensors whole, one after the other into the same memory, and keep some rows of each."""
    first, columns = tensors[0], tensors[0].matrix[1]
    data, dtype = memoryview(bytearray(first.nbytes)), TORCH[first.dtype]
    whole = torch.frombuffer(data, dtype=dtype).view(-1, columns)
    picked = torch.empty(len(tensors), len(rows[0]), columns, dtype=dtype)
    for tensor, part, chosen in zip(tensors, picked, torch.tensor(rows), strict=True):
        reader.read(tensor.path, tensor.start, data)
        torch.index_select(whole, 0, chosen, out=part)
    return picked


def _read(reader: Reader, tensors: Sequence[StoredTensor], rows: Sequence[Sequence[int]] | None) -> Tensor:
    """Read some rows of each tensor, in the stored dtype."""
    first, columns = tensors[0], tensors[0].matrix[1]
    each = first.nbytes if rows is None else len(rows[0]) * columns * first.itemsize
    data, filled = memoryview(bytearray(len(tensors) * each)), 0
    chosen = zip(tensors, rows or repeat(None), strict=False)
    for path, group in groupby(chosen, key=lambda pair: pair[0].path):
        runs = _joined([run for tensor, mine in group for run in _runs(tensor, mine)])
        length = sum(run[1] for run in runs)
        reader.gather(path, runs, data[filled : filled + length])
        filled += length
    return torch.frombuffer(data, dtype=TORCH[first.dtype]).view(len(tensors), -1, columns)


def read_ahead(reader: Reader, tensor: StoredTensor, rows: Sequence[int] | None = None) -> None:
    """Ask the system to read rows of a tensor, or all: what was just written may be on the disk alone.

    A file that is still on its way is left alone.
    """
    here = hasattr(os, "posix_fadvise") and not reader.is_remote(tensor.path) and tensor.path.is_file()
    if here and (rows or rows is None):
        with reader.using(tensor.path) as descriptor:
            for start, length in _joined(_runs(tensor, rows)):
                os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)


def _runs(tensor: StoredTensor, rows: Sequence[int] | None) -> list[tuple[int, int]]:
    """Return the (offset, length) in the file of each row, or of the whole tensor."""
    if rows is None:
        return [(tensor.start, tensor.nbytes)]
    start, line = tensor.start, tensor.matrix[1] * tensor.itemsize
    return [(start + row * line, line) for row in rows]


def _joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the runs, with neighbours joined: each costs a call of the system."""
    joined = [runs[0]]
    for start, length in runs[1:]:
        last, before = joined[-1]
        if last + before == start:
            joined[-1] = (last, before + length)
        else:
            joined.append((start, length))
    return joined
