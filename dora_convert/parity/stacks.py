"""Compare rows of weights that one plain LoRA or DoRA changes: rows of several such weights of a shape at once.

Most weights are such, and small ones cost more for calls than for numbers. So their rows lie in one stack:
(weights, rows, columns). A stack only tells of which weights every element is the float64 result, rounded to
nearest. `parity.expected` looks at the others, and measures how far they are off.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Decomposed, LowRank
from ..engine.precision import GRID, TORCH, as_bytes
from ..output.finished import Verdict
from ..plan.alike import kind_of
from ..plan.item import Item
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from ..storage.scatter import Place, fill, whole
from .stack_facts import MEMORY, NAMES, integers, stack_facts

CPU = torch.device("cpu")
HELD_BYTES = 1 << 19
"""Left factors up to this size are read whole: each row would be a call of the system."""
SMALL_BYTES = 1 << 18
"""A weight up to this size is read whole: its rows would be many calls of the system."""
READ, WHOLE = 4, 32
"""So many times the elements that are computed together are read at once, and so many bytes of whole weights."""


class SampledRows(NamedTuple):
    """A planned weight, its tensor as it was written, and the rows to compare."""

    item: Item
    written: StoredTensor
    rows: Sequence[int]

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
        pair = self.pairs[0]
        together = max(1, READ * self.elements // (pair.item.matrix[1] * max(len(pair.rows), pair.low.rank)))
        fitting = WHOLE * self.elements // pair.written.nbytes if pair.written.nbytes <= SMALL_BYTES else 0
        for first in range(0, len(self.pairs), together):
            yield from self._of(self.pairs[first : first + together], fitting)

    def _of(self, pairs: Sequence[SampledRows], fitting: int) -> Iterator[Verdict | None]:
        """Yield the verdicts on some weights, whose factors are held; so many of the weights may be read whole."""
        factors = StackedFactors.load(pairs, self.reader)
        rows, columns = len(pairs[0].rows), pairs[0].item.matrix[1]
        height = -(-rows // -(-rows * columns // (READ * self.elements)))  # of equal parts
        parts = [slice(first, first + height) for first in range(0, rows, height)]
        whole = fitting > 1 and len(parts) == 1
        count = fitting if whole else len(pairs)
        scratch = factors.scratch(height, self.elements, self.device)
        for first in range(0, len(pairs), count):
            some = pairs[first : first + count]
            mine = factors.of_weights(first, len(some), some[0].item.matrix[0])
            if len(parts) == 1:
                change, rounding, room = self._facts(some, mine, scratch, parts[0], whole=whole)
            else:
                each = (self._facts(some, mine.of_rows(part), scratch, part, whole=False) for part in parts)
                change, rounding, room = _together(list(each))
            for number, least in enumerate(room):
                yield (Verdict(rows * columns, rounding=rounding[number], change=change[number]) if least > 0 else None)

    def _facts(
        self, pairs: Sequence[SampledRows], factors: StackedFactors, scratch: list[Tensor], part: slice, *, whole: bool
    ) -> list[list[float]]:
        """Return the facts on each weight that `stack_facts` computes of some rows; small weights are read whole."""
        rows = None if whole else [pair.rows[part] for pair in pairs]
        base, sources = _rows("base", [pair.item.source for pair in pairs], rows)
        written, results = _rows("written", [pair.written for pair in pairs], rows)
        fill(self.reader, chain(sources, results))
        on_host = self.device.type == "cpu"
        many = on_host and len(pairs) > 1  # for one weight, compiling takes longer than it gains
        compute, facts = stack_facts if many else stack_facts.plain, list[list[float]]()
        precision, least = GRID[NAMES[written.dtype]]
        for quick in (True, False) if on_host else (False,):
            facts = compute(
                base=base,
                written=written,
                bits=integers(written),
                **factors._asdict(),
                scratch=scratch,
                units=[2.0**precision, 2.0**least],
                quick=quick,
            ).tolist()
            if all(room > 0 for room in facts[2]):
                break
        return facts


def _together(facts: Sequence[list[list[float]]]) -> list[list[float]]:
    """Return the facts on weights from those on parts of their rows: sums, and the least room."""
    changes, roundings, rooms = ([part[k] for part in facts] for k in range(3))
    least = [min(each) if all(room > 0 for room in each) else 0.0 for each in zip(*rooms, strict=True)]  # NaN is wrong
    return [*([sum(each) for each in zip(*sums, strict=True)] for sums in (changes, roundings)), least]


class StackedFactors(NamedTuple):
    """The factors of some weights, as they are stored, and the numbers of the compared rows."""

    A: Tensor  # (weights, r, columns)
    B: Tensor  # all rows of all weights, or the compared ones: (…, r)
    m: Tensor | None  # all magnitudes of all DoRAs
    scales: Tensor  # (weights, 1, 1), float64
    offsets: Tensor  # (weights, 1), float64: added to the magnitudes
    numbers: Tensor  # (weights, rows), among the rows of all weights

    @classmethod
    def load(cls, pairs: Sequence[SampledRows], reader: Reader) -> StackedFactors:
        """Read the factors."""
        rows, lows = [pair.rows for pair in pairs], [pair.low for pair in pairs]
        updates = [update for pair in pairs if isinstance(update := pair.item.edits[0].update, Decomposed)]
        A, right = _rows("A", [low.A for low in lows])
        B, left = _rows("B", [low.B for low in lows], rows if lows[0].B.nbytes > HELD_BYTES else None)
        m, sizes = _rows("m", [update.m for update in updates]) if updates else (None, ())
        fill(reader, chain(right, left, sizes))
        height, offsets = pairs[0].item.matrix[0], [update.offset for update in updates]
        return cls(
            A=A.view(len(pairs), -1, A.shape[1]),
            B=B,
            m=None if m is None else m.flatten(),
            scales=torch.tensor([low.scale for low in lows], dtype=torch.float64)[:, None, None],
            offsets=torch.tensor(offsets, dtype=torch.float64)[:, None],
            numbers=torch.tensor(rows) + torch.arange(0, height * len(pairs), height)[:, None],
        )

    def of_rows(self, part: slice) -> StackedFactors:
        """Return the factors for part of the compared rows of a weight alone."""
        alone = len(self.B) == self.numbers.numel()  # the compared rows alone
        return self._replace(numbers=self.numbers[:, part], B=self.B[part] if alone else self.B)

    def of_weights(self, first: int, count: int, height: int) -> StackedFactors:
        """Return the factors of some of the weights, which have so many rows."""
        if count == len(self.A):
            return self
        lines = len(self.B) // len(self.A)
        some = slice(first, first + count)
        return StackedFactors(
            A=self.A[some],
            B=self.B[first * lines : (first + count) * lines],
            m=None if self.m is None else self.m[first * height : (first + count) * height],
            scales=self.scales[some],
            offsets=self.offsets[some],
            numbers=self.numbers[some] - first * height,
        )

    def scratch(self, rows: int, elements: int, device: torch.device) -> list[Tensor]:
        """Return memory for so many elements of rows at most: x, its bits, W and A; and for all rows of B."""
        count, rank, columns = self.A.shape
        together = max(1, min(count, elements // (columns * max(rows, rank))))
        height = rows if together > 1 else max(1, min(rows, elements // columns))
        x, W, right, left = (
            MEMORY.tensor(name, size, torch.float64, device)
            for name, size in (
                ("x", (together, height, columns)),
                ("W", (together, height, columns)),
                ("right", (together, rank, columns)),
                ("left", (count, rows, rank)),
            )
        )
        return [x, x.view(torch.int64), W, right, left]


def _rows(
    name: str, tensors: Sequence[StoredTensor], rows: Sequence[Sequence[int]] | None = None
) -> tuple[Tensor, Iterator[tuple[Path, list[Place]]]]:
    """Return memory for some rows of each of several tensors of one shape, or for all, and the places to fill it from.

    It is (rows of all tensors, columns), in the stored dtype; the next call of this name overwrites it.
    """
    first, (height, columns) = tensors[0], tensors[0].matrix
    count = len(tensors) * (len(rows[0]) if rows else height)
    host = MEMORY.tensor(name, (count, columns), TORCH[first.dtype], CPU)
    data, size, line = as_bytes(host), host.nbytes // len(tensors), columns * first.itemsize
    if not rows:
        return host, whole(tensors, data)
    return host, (
        (tensor.path, _places(tensor, line, mine, data[k * size : (k + 1) * size]))
        for k, (tensor, mine) in enumerate(zip(tensors, rows, strict=True))
    )


def _places(tensor: StoredTensor, line: int, rows: Sequence[int], data: memoryview) -> list[Place]:
    """Return the places of lines of a tensor, of so many bytes, each with its part of a buffer."""
    return [(tensor.start + row * line, data[k * line : (k + 1) * line]) for k, row in enumerate(rows)]


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
