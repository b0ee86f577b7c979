"""Check a written output against its plan, recomputed in float64 by other code than the merge's.

An element is *wrong* if it is further from the float64 result x than any honest rounding can take it:

    tol = |f|·(r+2)·2⁻²⁴·(|s|·(|B||A|) + |W|) + ½ulp_d(x) + (√in + 6)·2⁻²⁴·|x|

with f = m/n (1 for LoRA) and d the stored dtype: a merge rounds once. docs/precision.md derives the bound.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..engine.precision import nearest, ordinal, read_rows
from ..errors import VerificationError
from ..output.finished import TensorResult, Verdict
from ..output.shards import LEAST_UNCACHED
from ..plan.item import Item
from ..plan.plan import OutputShard, Plan
from ..storage import reader as reading
from ..storage.reader import Reader, spans
from ..storage.safetensors import StoredTensor, read_header
from .stacks import CPU, SampledRows, read_ahead, verdicts_on_right

if TYPE_CHECKING:
    from .expected import Expected

RANDOM_ROWS = 16
ARRAYS = 12
"""Arrays of a chunk's elements that are held."""
ON_PROCESSOR = (1 << 10, 1 << 17)
"""The fewest and the most elements of rows that are compared together, as memory allows."""
OF_SEVERAL = 1 << 15
"""The most of several edits, which take many steps: so many stay in a processor's own cache."""
ON_DEVICE = (1 << 15, 1 << 20)
"""The same for a device, which is asked for answers less often then."""
MOST_ROWS = 1024
"""So many of the rows that an adapter set are compared."""


class WrittenTensors:
    """The tensors of a written folder, by name; a shard's header is read back when its first tensor is asked for."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._found = folder, dict[str, StoredTensor]()
        self._shards = {item.name: shard for shard in plan.shards for item in shard.items}

    def tensor(self, name: str) -> StoredTensor:
        """Return a tensor as it was written; VerificationError for a shard with other tensors than the plan's."""
        if name not in self._found:
            self.read([self._shards[name]])
        return self._found[name]

    def read(self, shards: Iterable[OutputShard]) -> None:
        """Read the headers of shards back."""
        for shard in shards:
            path = self._folder / shard.filename
            tensors = read_header(path).tensors
            _refuse_unreadable(path, {item.name.removeprefix(shard.prefix) for item in shard.items})
            self._found |= {shard.prefix + name: tensor for name, tensor in tensors.items()}


class SelfCheck:
    """Compares tensors of a written folder, with headers read back from the disk, with the definitions."""

    def __init__(self, folder: Path, plan: Plan, reader: Reader, memory: int = 0) -> None:
        """`memory` is a worker's share of the budget: the more the costliest item leaves, the larger the chunks."""
        self._reader, self._spare = reader, memory - plan.memory
        self._seed = plan.fingerprint
        self._written = WrittenTensors(folder, plan)
        self.read_headers = self._written.read

    def check_all(
        self, finished: Sequence[tuple[Item, TensorResult]], device: torch.device | None = None
    ) -> list[Verdict]:
        """Check several items; rows of plain LoRAs and DoRAs of one shape are compared together."""
        pairs = [SampledRows(item, self._written.tensor(item.name), self._rows(item)) for item, _ in finished]
        for pair in pairs:
            if pair.written.nbytes >= LEAST_UNCACHED:
                read_ahead(self._reader, pair.written, pair.rows)
        right = verdicts_on_right(pairs, self._reader, device or CPU, self._elements(1, device or CPU))
        return [right.get(item.name) or self.check(item, result, device) for item, result in finished]

    def check(self, item: Item, result: TensorResult, device: torch.device | None = None) -> Verdict:
        """Compare a sample of an item's rows: both ends of every block, and some at random; on a device, if given."""
        written = self._written.tensor(item.name)
        if (written.dtype, written.shape) != (item.dtype, item.shape):
            return Verdict(written.numel, written.numel)
        return self._compare(item, written, result, device or CPU)

    def _compare(self, item: Item, written: StoredTensor, result: TensorResult, device: torch.device) -> Verdict:
        verdict, expected = self._against(item, written, result, device)
        if not (result.cuts and item.combination):
            return verdict
        from .combined import misled

        if misled(expected):
            verdict, _ = self._against(item, written, replace(result, cuts=()), device)
        return verdict

    def _against(
        self, item: Item, written: StoredTensor, result: TensorResult, device: torch.device
    ) -> tuple[Verdict, Expected]:
        """Compare with the definition, if thresholds of pruning are as claimed."""
        rows = self._rows(item)
        if item.parts:
            from .recoded import as_written, compare_coded

            expected = self._expected(item, result, CPU)
            return compare_coded(as_written(item, self._written.tensor), expected, rows, self._reader), expected
        written = replace(written, shape=item.stacked) if written.shape != item.stacked else written
        expected = self._expected(item, result, device)
        return compare(written, expected, rows, self._reader), expected

    def _rows(self, item: Item) -> list[int]:
        return sample_rows(item, f"{self._seed}/{item.name}")

    def _expected(self, item: Item, result: TensorResult, device: torch.device) -> Expected:
        """Return the definition of an item's result, for a comparison of some rows."""
        elements = self._elements(len(item.edits), device)
        if not item.combination:
            from .expected import Expected

            return Expected(item, self._reader, device, elements)
        from .combined import expected_of

        expected = expected_of(item, self._reader, device, cuts=result.cuts)
        expected.elements = min(elements, OF_SEVERAL) if device.type == "cpu" else elements
        return expected

    def _elements(self, edits: int, device: torch.device) -> int:
        """Return the elements that are computed together, as the memory allows: calls cost more than numbers."""
        fitting = self._spare // (8 * ARRAYS * max(1, edits))
        fewest, most = ON_PROCESSOR if device.type == "cpu" else ON_DEVICE
        return max(fewest, min(fitting, most))


def _refuse_unreadable(path: Path, names: set[str]) -> None:
    """Raise VerificationError if the safetensors library reads other tensors from a shard than the plan's."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = set(file.keys())
    except SafetensorError as error:
        raise VerificationError(f"{path.name}: safetensors cannot read what was written ({error}).") from error
    if tensors != names:
        raise VerificationError(f"{path.name}: safetensors finds other tensors than were written.")


class Chance(threading.local):
    """A generator of random numbers for each thread: a new one would be seeded twice."""

    def __init__(self) -> None:
        self._numbers = random.Random(0)  # noqa: S311 - rows to look at

    def of(self, seed: str) -> random.Random:
        """Return the generator, at the start of the numbers of a seed."""
        self._numbers.seed(seed)
        return self._numbers


CHANCE = Chance()


def sample_rows(item: Item, seed: str) -> list[int]:
    """Return both ends of every block, all rows that an adapter set, and further rows at random by the seed.

    Large blocks of a device have few ends: those of a processor's blocks are added.
    """
    rows, chance, usual = item.matrix[0], CHANCE.of(seed), reading.BLOCK_ELEMENTS
    sample = set(_ends(item.matrix, item.experts, (item.block_elements or usual, usual)))
    enough, number = min(rows, len(sample) + RANDOM_ROWS), chance.random
    while len(sample) < enough:
        sample.add(int(rows * number()))
    for trained in item.rows:
        few = len(trained.index) <= MOST_ROWS
        sample |= set(trained.index if few else chance.sample(trained.index, MOST_ROWS))
    chosen = sorted(sample)
    if chosen and chosen[-1] >= (end := rows + item.grown):  # an unmerge has no new rows
        return [row for row in chosen if row < end]
    return chosen


@lru_cache(maxsize=64)
def _ends(matrix: tuple[int, int], experts: int, elements: tuple[int, ...]) -> frozenset[int]:
    """Return both ends of every block, for each of some numbers of elements that blocks have."""
    blocks = chain.from_iterable(spans(*matrix, experts, elements=each) for each in set(elements))
    return frozenset(row for block in blocks for row in (block[0], block[1] - 1))


def compare(written: StoredTensor, expected: Expected, rows: Sequence[int], reader: Reader) -> Verdict:
    """Count the elements of some rows that are off, and measure the distance of these elements."""
    item = expected.item
    total = Verdict()
    for chunk in expected.chunks(rows):
        x, base = expected.rows(chunk)
        got, rounded = read_rows(reader, written, chunk).to(x.device).double(), nearest(x, item.dtype)
        total += Verdict(
            checked=x.numel(),
            rounding=_square(rounded - x) if item.changed else 0.0,
            change=_square(x - base) if item.changed else 0.0,
        )
        if not torch.equal(got, rounded):
            wrong, ulp = distance(got, expected, chunk, rounded_once=True)
            total += Verdict(wrong=wrong, max_ulp=ulp)
    return total


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) ** 2


def distance(got: Tensor, expected: Expected, rows: Sequence[int], *, rounded_once: bool) -> tuple[int, int]:
    """Return the number of elements of some rows that lie outside the bound, and the largest distance in ulps."""
    dtype = expected.item.dtype
    x, _ = expected.rows(rows)
    rounded = nearest(x, dtype)
    outside = ~((got - x).abs() <= expected.bound(rows, x, rounded_once=rounded_once)) & (got != rounded)
    return int(outside.sum()), int((ordinal(got, dtype) - ordinal(rounded, dtype)).abs().max())
