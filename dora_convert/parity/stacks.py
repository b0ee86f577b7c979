"""Compare rows of weights that one plain LoRA or DoRA changes: rows of several such weights of a shape at once.

Most weights are such, and small ones cost more for calls than for numbers. So their rows lie in one stack:
(weights, rows, columns). A stack only tells of which weights every element is the float64 result, rounded to
nearest. `parity.expected` looks at the others, and measures how far they are off.
"""

from __future__ import annotations

import math
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Decomposed, LowRank
from ..engine.precision import EXPONENT, GRID, TORCH, half_ulp
from ..output.finished import Verdict
from ..plan.alike import kind_of
from ..plan.item import Item
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor

CPU = torch.device("cpu")
SMALL_BYTES = 1 << 19
"""A tensor up to this size is read whole if some rows are asked for: a call of the system costs as much."""


HELD_BYTES = 1 << 19
"""Left factors up to this size are read whole: each row would be a call of the system."""


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
        rows, columns = len(self.pairs[0].rows), self.pairs[0].item.matrix[1]
        together = max(1, self.elements // (columns * max(rows, self.pairs[0].low.rank)))
        for first in range(0, len(self.pairs), together):
            yield from self._of(self.pairs[first : first + together], rows, columns)

    def _of(self, pairs: Sequence[SampledRows], rows: int, columns: int) -> Iterator[Verdict | None]:
        """Yield the verdicts on some weights, whose factors are held."""
        factors = StackedFactors.load(pairs, self.reader, self.device)
        height = -(-rows // -(-rows * columns // self.elements))  # of equal parts
        parts = [slice(first, first + height) for first in range(0, rows, height)]
        for quick in (True, False) if self.device.type == "cpu" else (False,):
            facts = torch.stack([self._facts(pairs, factors, part, quick=quick) for part in parts]).tolist()
            room = [min(each) for each in zip(*(part[2] for part in facts), strict=True)]
            if all(least > 0 for least in room):
                break
        for number in range(len(pairs)):
            change, rounding = (sum(part[k][number] ** 2 for part in facts) for k in (0, 1))
            right = all(part[2][number] > 0 for part in facts)
            yield Verdict(rows * columns, change=change, rounding=rounding) if right else None

    def _facts(self, pairs: Sequence[SampledRows], factors: StackedFactors, part: slice, *, quick: bool) -> Tensor:
        """Return three facts on each weight: ‖x − W‖, ‖got − x‖, and the room for its worst element.

        If the last is positive, every element is the value nearest to x, ties to even. NaN is not positive.
        """
        rows = [pair.rows[part] for pair in pairs]
        raw = read_stack(self.reader, [pair.item.source for pair in pairs], rows)
        both = MEMORY.tensor("both", (2, *raw.shape), self.device)
        both[0] = raw
        x = factors.result(both[0], part)
        written = read_stack(self.reader, [pair.written for pair in pairs], rows)
        both[1] = written
        norms = torch.linalg.vector_norm(both.sub_(x), dim=(2, 3))
        spare, off = both
        room = least_room(off.abs_(), x, written, spare if quick else None)
        return torch.cat([norms, room.unsqueeze(0)])


class StackedFactors(NamedTuple):
    """The factors of the compared rows of some weights, with the magnitudes of DoRAs, in float64."""

    left: Tensor  # (weights, rows, r)
    right: Tensor  # (weights, r, columns), s·A
    m: Tensor | None  # (weights, rows)

    @classmethod
    def load(cls, pairs: Sequence[SampledRows], reader: Reader, device: torch.device) -> StackedFactors:
        """Read the factors."""
        right = MEMORY.doubles("A", read_stack(reader, [pair.low.A for pair in pairs]), device)
        scales = [pair.low.scale for pair in pairs]
        right *= scales[0] if len(set(scales)) == 1 else torch.tensor(scales).double().to(device)[:, None, None]
        B, rows = [pair.low.B for pair in pairs], [pair.rows for pair in pairs]
        left = read_stack(reader, B, rows, HELD_BYTES).to(device).to(torch.float64, copy=True)
        return cls(left, right, _magnitudes(pairs, reader, device))

    def result(self, W: Tensor, part: slice) -> Tensor:
        """Return x of some rows: W + s·BA, or m times it over its norm."""
        V = torch.baddbmm(W, self.left[:, part], self.right, out=MEMORY.tensor("x", W.shape, W.device))
        if self.m is None:
            return V
        return V.mul_((self.m[:, part] / torch.linalg.vecdot(V, V).sqrt_()).unsqueeze(2))


def _magnitudes(pairs: Sequence[SampledRows], reader: Reader, device: torch.device) -> Tensor | None:
    """Return the magnitudes of the compared rows, (weights, rows), in float64; None for LoRAs."""
    updates = [pair.item.edits[0].update for pair in pairs]
    decomposed = [update for update in updates if isinstance(update, Decomposed)]
    if not decomposed:
        return None
    m = read_stack(reader, [update.m for update in decomposed]).flatten(1)
    m = m.gather(1, torch.tensor([pair.rows for pair in pairs])).to(device).double()
    offsets = [update.offset for update in decomposed]
    return m.add_(torch.tensor(offsets, dtype=m.dtype, device=device)[:, None]) if any(offsets) else m


class Memory(threading.local):
    """Memory that a thread uses again for each stack: fresh pages cost more than arithmetic."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._bytes = bytearray()

    def tensor(self, name: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return a float64 tensor with any values, which the next call of this name overwrites."""
        if device.type != "cpu":
            return torch.empty(tuple(shape), dtype=torch.float64, device=device)
        number = math.prod(shape)
        if name not in self._tensors or self._tensors[name].numel() < number:
            self._tensors[name] = torch.empty(number, dtype=torch.float64)
        return self._tensors[name][:number].view(tuple(shape))

    def doubles(self, name: str, values: Tensor, device: torch.device) -> Tensor:
        """Return values in float64 on a device, which widens them itself."""
        if device.type != "cpu":
            return values.to(device).double()
        return self.tensor(name, values.shape, device).copy_(values)

    def bytes(self, number: int) -> memoryview:
        """Return so many bytes, which the next call overwrites."""
        if len(self._bytes) < number:
            self._bytes = bytearray(number)
        return memoryview(self._bytes)[:number]


MEMORY = Memory()
NAMES = {kind: name for name, kind in TORCH.items()}


def least_room(off: Tensor, x: Tensor, written: Tensor, spare: Tensor | None = None) -> Tensor:
    """Return the least ½ulp(x) − `off` in each matrix of a stack, in any unit: its sign alone counts, and is exact.

    A tie has room if `written`, the numbers as they are stored, has the even neighbour.

    Half a unit in the last place is a power of two: 2⁻ᵖ of the one that is not above |x|, which takes x's place.
    Subnormal numbers have larger units than that; with `spare`, which is overwritten, this is left out.
    """
    dtype = NAMES[written.dtype]
    if spare is None:
        room = half_ulp(x, dtype).sub_(off)
    else:
        power = x.view(torch.int64).bitwise_and_(EXPONENT).view(torch.float64)
        room = torch.sub(power, off, alpha=2.0 ** GRID[dtype][0], out=spare)
    least = room.amin(dim=(1, 2))
    if not (least == 0).any():
        return least
    ties = room.eq(0).nonzero(as_tuple=True)
    bits = written.view(torch.int16 if written.element_size() == 2 else torch.int32)
    room[ties] = bits[tuple(index.cpu() for index in ties)].bitwise_and(1).eq(0).to(room)
    return room.amin(dim=(1, 2))


def read_stack(
    reader: Reader,
    tensors: Sequence[StoredTensor],
    rows: Sequence[Sequence[int]] | None = None,
    small: int = SMALL_BYTES,
) -> Tensor:
    """Read some rows of each of several tensors of one shape, or all: (tensors, rows, columns) in the stored dtype.

    The next call overwrites them. Tensors of up to `small` bytes are read whole.
    """
    if rows is None or tensors[0].nbytes > small:
        return _read(reader, tensors, rows)
    stack, chosen = _read(reader, tensors, None), torch.tensor(rows)
    return stack[0, chosen[0]].unsqueeze(0) if len(stack) == 1 else stack[torch.arange(len(stack))[:, None], chosen]


def _read(reader: Reader, tensors: Sequence[StoredTensor], rows: Sequence[Sequence[int]] | None) -> Tensor:
    """Read some rows of each tensor, in the stored dtype."""
    first, columns = tensors[0], tensors[0].matrix[1]
    each = first.nbytes if rows is None else len(rows[0]) * columns * first.itemsize
    data, filled = MEMORY.bytes(len(tensors) * each), 0
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
