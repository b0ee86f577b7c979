"""Does the output hold what the plan says? Recomputed in float64 from the files, by other code than the merge's.

An element got is *wrong* when it is further from the float64 result x than any honest rounding can take it:

    tol = |f|·(½ulp_d(Δ) + (r+2)·2⁻²⁴·(|s|·(|B||A|) + |W|)) + ½ulp_d(x) + (√in + 6)·2⁻²⁴·|x|

with f = m/n (1 for LoRA), d the stored dtype and Δ = sBA. Where under 0.1 % of the elements differ from the
rounded result, the tensor was rounded once and the ½ulp_d(Δ) term is dropped. docs/precision.md says where it comes from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..engine.rows import read_rows
from ..errors import VerificationError
from ..output.finished import Verdict
from ..plan.item import Item
from ..plan.plan import Plan
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor, read_header
from .expected import Expected
from .expected_base import ExpectedBase
from .ulps import nearest, ordinal

RANDOM_ROWS = 16
ROUNDED_ONCE = 0.001
"""Share of elements off the rounded result below which a tensor was rounded once: float32 leaves a third of that."""
FEW = 2
"""Elements of a small tensor that say nothing about that."""


class Checker:
    """Compares tensors of a written folder, whose headers it reads back from the disk, with what they should be."""

    def __init__(self, folder: Path, plan: Plan, reader: Reader) -> None:
        self._reader = reader
        self._seed = plan.fingerprint
        self._written: dict[str, StoredTensor] = {}
        for shard in plan.shards:
            path = folder / shard.filename
            self._written |= read_header(path).tensors
            _refuse_unreadable(path, {item.name for item in shard.items})

    def check(self, item: Item, digest: str) -> Verdict:
        """Compare a sample of an item's rows: both ends of every block, and some at random.

        Of what was recovered bit for bit all is read back: `digest` is the xxh3-128 of what was written.
        """
        written = self._written[item.name]
        if (written.dtype, written.shape) != (item.dtype, item.shape):
            return Verdict(written.numel, written.numel)
        if item.undo and item.undo.ulps:
            same = self._reader.digest(written).fast == digest
            return Verdict(written.numel, 0 if same else written.numel)
        written = replace(written, shape=item.source.shape)  # as it was made: experts one below the other
        rows = sample_rows(item, f"{self._seed}/{item.name}")
        expected = ExpectedBase(item, self._reader) if item.undo else Expected(item, self._reader)
        return compare(written, expected, rows, self._reader)


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


def sample_rows(item: Item, seed: str) -> list[int]:
    """Both ends of every block, all rows that were set, and random ones that depend on the seed alone."""
    rows, chance = item.source.matrix[0], random.Random(seed)  # noqa: S311
    found = {row for start, stop in item.spans() for row in (start, stop - 1)}
    found |= {row for trained in item.rows for row in trained.index}
    found |= {chance.randrange(rows) for _ in range(RANDOM_ROWS if rows else 0)}
    return sorted(found)


def compare(written: StoredTensor, expected: Expected, rows: Sequence[int], reader: Reader) -> Verdict:
    """Count what is off in some rows, and how far; the bound is worked out only where something is."""
    item = expected.item
    chunks = list(expected.chunks(rows))
    total, suspects, off = Verdict(), [], 0
    for chunk in chunks:
        x, base = expected.rows(chunk)
        got, rounded = read_rows(reader, written, chunk).double(), nearest(x, item.dtype)
        total += Verdict(
            checked=x.numel(),
            rounding=_square(rounded - x) if item.changed else 0.0,
            change=_square(x - base) if item.changed else 0.0,
        )
        if not torch.equal(got, rounded):
            suspects.append((chunk, got))
            off += int((got != rounded).sum())
    for chunk, got in suspects:
        wrong, ulp = distance(got, expected, chunk, rounded_once=rounded_once(off, total.checked))
        total += Verdict(wrong=int(wrong.sum()), max_ulp=ulp)
    return total


def rounded_once(off: int, elements: int) -> bool:
    """Whether a tensor with so many elements off the rounded result was rounded once all the same."""
    return off <= max(FEW, ROUNDED_ONCE * elements)


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x).square())


def distance(
    got: Tensor, expected: Expected, rows: Sequence[int], *, rounded_once: bool
) -> tuple[Tensor, int]:
    """Which elements of some rows lie outside the bound, and how many ulps the farthest one is off."""
    dtype = expected.item.dtype
    x, _ = expected.rows(rows)
    rounded = nearest(x, dtype)
    outside = ~((got - x).abs() <= expected.bound(rows, x, rounded_once=rounded_once)) & (got != rounded)
    return outside, int((ordinal(got, dtype) - ordinal(rounded, dtype)).abs().max())
