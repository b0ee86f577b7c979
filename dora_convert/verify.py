"""Does the output hold what the plan says? Recomputed in float64 from the files, by other code than the merge's.

An element got is *wrong* when it is further from the float64 result x than any honest rounding can take it:

    tol = |f|·(½ulp_d(Δ) + (r+2)·2⁻²⁴·(|s|·(|B||A|) + |W|)) + ½ulp_d(x) + (√in + 6)·2⁻²⁴·|x|

with f = m/n (1 for LoRA), d the stored dtype and Δ = sBA. Where under 1 % of the elements differ from the rounded
result, the tensor was rounded once and the ½ulp_d(Δ) term is dropped. docs/precision.md says where it comes from.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import memory
from .blocks import spans
from .errors import VerificationError
from .plan import Edit, Item, Plan
from .precision import TORCH
from .stored import Reader, Stored, read_header
from .updates import Decomposed, low_rank

RANDOM_ROWS = 16
CHUNK_ELEMENTS = 1 << 16
EPSILON = 2.0**-24
ROUNDED_ONCE = 0.01
GRID = {"BF16": (8, -126), "F16": (11, -14), "F32": (24, -126), "F64": (53, -1022)}
"""Precision in bits and the least exponent of each dtype."""


@dataclass(frozen=True)
class Verdict:
    """What a check found; the counts of several add up."""

    checked: int = 0
    """Elements compared."""
    wrong: int = 0
    """Elements outside the bound."""
    max_ulp: int = 0
    """Largest distance from the rounded float64 result, in units in the last place of the stored dtype."""
    rounding: float = 0.0
    """Σ (rounded − x)², what rounding into the stored dtype takes away."""
    change: float = 0.0
    """Σ (x − W)², what the adapter does."""

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(
            self.checked + other.checked,
            self.wrong + other.wrong,
            max(self.max_ulp, other.max_ulp),
            self.rounding + other.rounding,
            self.change + other.change,
        )

    @property
    def lost(self) -> float | None:
        """Share of the change's norm lost to rounding; None where nothing changes."""
        return math.sqrt(self.rounding / self.change) if self.change else None


class Checker:
    """Compares tensors of a written folder, whose headers it reads back from the disk, with what they should be."""

    def __init__(self, folder: Path, plan: Plan, reader: Reader) -> None:
        self._reader = reader
        self._seed = plan.fingerprint
        self._written: dict[str, Stored] = {}
        for shard in plan.shards:
            path = folder / shard.filename
            self._written |= read_header(path).tensors
            _refuse_unreadable(path, {item.name for item in shard.items})

    def check(self, item: Item) -> Verdict:
        """Compare a sample of an item's rows: both ends of every block, and some at random."""
        written = self._written[item.name]
        if (written.dtype, written.shape) != (item.dtype, item.shape):
            return Verdict(written.numel, written.numel)
        rows = sample_rows(item.source, f"{self._seed}/{item.name}")
        return compare(written, Expected(item, self._reader), rows, self._reader)


def _refuse_unreadable(path: Path, names: set[str]) -> None:
    """What loaders will read a shard with must see in it what the plan put there."""
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
    except SafetensorError as error:
        raise VerificationError(
            f"{path.name}: safetensors cannot read what was written ({error})."
        ) from error
    if found != names:
        raise VerificationError(f"{path.name}: safetensors finds other tensors than were written.")


def sample_rows(tensor: Stored, seed: str) -> list[int]:
    """Both ends of every block, and random rows that depend on the seed alone."""
    rows, chance = tensor.matrix[0], random.Random(seed)  # noqa: S311
    found = {row for start, stop in spans(tensor) for row in (start, stop - 1)}
    found |= {chance.randrange(rows) for _ in range(RANDOM_ROWS if rows else 0)}
    return sorted(found)


def compare(written: Stored, expected: Expected, rows: Sequence[int], reader: Reader) -> Verdict:
    """Count what is off in some rows, and how far; the bound is worked out only where something is."""
    item = expected.item
    chunks = list(_chunks(rows, item.source.matrix[1]))
    total, suspects, off = Verdict(), [], 0
    for chunk in chunks:
        x, base = expected.rows(chunk)
        got, rounded = _rows(reader, written, chunk).double(), nearest(x, item.dtype)
        total += Verdict(
            checked=x.numel(),
            rounding=_square(rounded - x) if item.changed else 0.0,
            change=_square(x - base) if item.changed else 0.0,
        )
        if not torch.equal(got, rounded):
            suspects.append((chunk, got))
            off += int((got != rounded).sum())
    for chunk, got in suspects:
        total += _distance(got, expected, chunk, rounded_once=off < ROUNDED_ONCE * total.checked)
    return total


def _chunks(rows: Sequence[int], columns: int) -> Iterator[Sequence[int]]:
    height = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, len(rows), height):
        yield rows[start : start + height]


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x).square())


def _distance(got: Tensor, expected: Expected, rows: Sequence[int], *, rounded_once: bool) -> Verdict:
    """How many elements of some rows lie outside the bound, and how many ulps the farthest one is off."""
    dtype = expected.item.dtype
    x, _ = expected.rows(rows)
    rounded = nearest(x, dtype)
    outside = ~((got - x).abs() <= expected.bound(rows, x, rounded_once=rounded_once))
    wrong = int((outside & (got != rounded)).sum())
    return Verdict(wrong=wrong, max_ulp=int((_ordinal(got, dtype) - _ordinal(rounded, dtype)).abs().max()))


class Expected:
    """The float64 result x of an item, any rows of it, and what its bound is made of."""

    def __init__(self, item: Item, reader: Reader) -> None:
        self.item, self._reader = item, reader
        self._right = [self._load_right(edit) for edit in item.edits]
        self._m = [
            self._load(edit.update.m).flatten() if isinstance(edit.update, Decomposed) else None
            for edit in item.edits
        ]
        self._column_norms = [
            self._measure(edit, right) if edit.two_passes else None
            for edit, right in zip(item.edits, self._right, strict=True)
        ]

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x = W + Σ wᵢ·(fᵢ·(W + Δᵢ) − W), and the base's weight."""
        W = self._load(self.item.source, rows)
        base = self._load(self.item.base, rows) if self.item.replaced else W
        parts = self._parts(W, rows)
        if len(parts) == 1 and self.item.edits[0].weight == 1:
            return (W + parts[0][0]) * parts[0][1], base
        x = W.clone()
        for edit, (delta, f) in zip(self.item.edits, parts, strict=True):
            x += edit.weight * ((W + delta) * f - W)
        return x, base

    def bound(self, rows: Sequence[int], x: Tensor, *, rounded_once: bool) -> Tensor:
        """How far from x an honest result may be."""
        W, dtype = self._load(self.item.source, rows), self.item.dtype
        tolerance = half_ulp(x, dtype) + (math.sqrt(W.shape[1]) + 6) * EPSILON * x.abs()
        parts = self._parts(W, rows)
        for edit, right, (delta, f) in zip(self.item.edits, self._right, parts, strict=True):
            low = low_rank(edit.update)
            size = abs(low.scale) * (self._left(edit, rows).abs() @ right.abs()) + W.abs()
            slack = (low.rank + 2) * EPSILON * size
            slack = slack if rounded_once else slack + half_ulp(delta, dtype)
            tolerance += abs(edit.weight) * f.abs() * slack
        return tolerance

    def _parts(self, W: Tensor, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Δ = sBA of these rows and f = m/n, which broadcasts over them, for every edit."""
        found = []
        for edit, right, m, n in zip(self.item.edits, self._right, self._m, self._column_norms, strict=True):
            delta = self._delta(edit, rows, right)
            if m is None:
                f = torch.ones((), dtype=torch.float64)
            elif n is None:
                V = W + delta
                f = (m[list(rows)] / torch.einsum("kc,kc->k", V, V).sqrt())[:, None]
            else:
                f = m / n
            found.append((delta, f))
        return found

    def _measure(self, edit: Edit, right: Tensor) -> Tensor:
        """‖W + sBA‖ along the columns, which takes the whole tensor."""
        squares = torch.zeros(right.shape[1], dtype=torch.float64)
        for chunk in _chunks(range(self.item.source.matrix[0]), right.shape[1]):
            V = self._load(self.item.source, chunk) + self._delta(edit, chunk, right)
            squares += torch.einsum("kc,kc->c", V, V)
        return squares.sqrt()

    def _delta(self, edit: Edit, rows: Sequence[int], right: Tensor) -> Tensor:
        return low_rank(edit.update).scale * torch.einsum("kr,rc->kc", self._left(edit, rows), right)

    def _left(self, edit: Edit, rows: Sequence[int]) -> Tensor:
        """The factor that has the stored matrix's rows, (rows, r)."""
        low = low_rank(edit.update)
        if edit.slot.transposed:
            return _columns(self._reader, low.A, rows).double().T
        return self._load(low.B, rows)

    def _load_right(self, edit: Edit) -> Tensor:
        """The factor that has the stored matrix's columns, (r, columns)."""
        low = low_rank(edit.update)
        return self._load(low.B).T if edit.slot.transposed else self._load(low.A)

    def _load(self, tensor: Stored, rows: Sequence[int] | None = None) -> Tensor:
        """Rows of a stored tensor's matrix, or all of them, in float64."""
        chosen = range(tensor.matrix[0]) if rows is None else rows
        loaded = memory.empty((len(chosen), tensor.matrix[1]), torch.float64)
        filled = 0
        for chunk in _chunks(chosen, tensor.matrix[1]):
            loaded[filled : filled + len(chunk)] = _rows(self._reader, tensor, chunk)
            filled += len(chunk)
        return loaded


def half_ulp(x: Tensor, dtype: str) -> Tensor:
    """Half the distance between neighbours of x in a dtype."""
    precision, least = GRID[dtype]
    exponent = (x.view(torch.int64) >> 52 & 0x7FF).clamp_(min=least + 1023)  # biased, as float64 stores it
    return (exponent.sub_(precision) << 52).view(torch.float64)


def nearest(x: Tensor, dtype: str) -> Tensor:
    """x rounded to the nearest value of a dtype, ties to even, still in float64: a quotient and an integer rounding."""
    if dtype == "F64":
        return x
    unit = 2 * half_ulp(x, dtype)
    return torch.round(x / unit).mul_(unit)


def _ordinal(x: Tensor, dtype: str) -> Tensor:
    """Each value's place among the representable numbers of a dtype."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[TORCH[dtype].itemsize]
    bits = x.to(TORCH[dtype]).view(kind).long()
    return torch.where(bits < 0, -(bits & torch.iinfo(kind).max), bits)


def _rows(reader: Reader, tensor: Stored, rows: Sequence[int]) -> Tensor:
    """Some rows of a stored tensor's matrix, in its own dtype."""
    width = tensor.matrix[1]
    runs = [(start * width, count * width) for start, count in _runs(rows)]
    return _gather(reader, tensor, runs).view(len(rows), width)


def _columns(reader: Reader, tensor: Stored, columns: Sequence[int]) -> Tensor:
    """Some columns of a stored tensor's matrix, in its own dtype."""
    height, width = tensor.matrix
    runs = [(row * width + start, count) for row in range(height) for start, count in _runs(columns)]
    return _gather(reader, tensor, runs).view(height, len(columns))


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(start, count) of each run of neighbours."""
    if isinstance(numbers, range):
        return [(numbers.start, len(numbers))]
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _gather(reader: Reader, tensor: Stored, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Runs of elements, given by (first, count), one after another."""
    size = tensor.itemsize
    data = bytearray(size * sum(count for _, count in runs))
    view, position = memoryview(data), 0
    for first, count in runs:
        reader.read(tensor.path, tensor.start + first * size, view[position : position + count * size])
        position += count * size
    dtype = TORCH[tensor.dtype]
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
