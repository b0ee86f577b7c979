"""Load the tensors of an edit, compare them with the base, and apply the edit to any block of the stored weight."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, Decomposed, Delta, LowRank, low_rank
from ..errors import Fault, UnsupportedError
from ..maths import lora as maths
from ..plan.item import Edit
from ..plan.plan import Plan
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .device_buffers import DeviceBuffers
from .precision import TORCH, ComputeSpec

SAMPLED_ROWS = 16
SAMPLED_FOR_COLUMNS = 256
OTHER_BASE = 0.5
"""A median |m/‖W‖ − 1| above this means that m was trained on other weights."""
NEAR_ONE, FAR = 0.5, math.log(1.4)
"""Normalised magnitudes are this near to 1 in the median, where log ‖W‖ is farther than this from 0."""
PARTS = frozenset({2, 4, 8, 16, 32, 64, 128, 256})
"""Numbers of ranks that share a tensor in ZeRO-3."""


class FactorPair:
    """The factors of V = W + s·left·right, held whole, for any block of rows of the stored weight."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right

    def left(self, start: int, stop: int) -> Tensor:
        """Return rows of the factor that has the weight's rows: (stop − start, r)."""
        return self._left[start:stop]

    def right(self, start: int) -> Tensor:  # noqa: ARG002 - the same for all rows
        """Return the factor with the weight's columns, (r, columns), for a block that begins at `start`."""
        return self._right


class FixedPoint(NamedTuple):
    """Fixed-point units for two factors, so coarse that the product of any of their blocks is exact."""

    left: float
    """The largest magnitude in the left factor."""
    right: float
    """The largest magnitude in the right factor."""
    rank: int

    def left_(self, x: Tensor) -> Tensor:
        """Round part of the left factor, in place."""
        return maths.to_fixed_(x, self.left, self.rank)

    def right_(self, x: Tensor) -> Tensor:
        """Round part of the right factor, in place."""
        return maths.to_fixed_(x, self.right, self.rank)


class StreamedFactors(FactorPair):
    """Factors of one weight: the right one is held, the left one is read with each block."""

    def __init__(
        self, low: LowRank, buffers: DeviceBuffers, *, transposed: bool, fixed: FixedPoint | None = None
    ) -> None:
        self._low, self._buffers, self._transposed, self._fixed = low, buffers, transposed, fixed
        held, blocks = (low.B, low.blocks[1]) if transposed else (low.A, low.blocks[0])
        right = maths.block_diagonal(buffers.whole(held), blocks, 0)
        if low.d:  # diag(d) may stand on either side of the product
            right = right * buffers.whole(low.d).view((1, -1) if transposed else (-1, 1))
        self._right = right.T if transposed else right
        if fixed:
            fixed.right_(self._right)

    def left(self, start: int, stop: int) -> Tensor:
        """Read rows of the left factor: (stop − start, r)."""
        part = self._read_left(start, stop)
        return self._fixed.left_(part) if self._fixed else part

    def _read_left(self, start: int, stop: int) -> Tensor:
        low = self._low
        if self._transposed:
            if low.blocks[0] > 1:
                return maths.block_diagonal(self._buffers.whole(low.A), low.blocks[0], 0)[:, start:stop].T
            return self._buffers.columns(low.A, start, stop).T
        part = self._buffers.rows(low.B, start, stop)
        return maths.block_diagonal(part, low.blocks[1], start, low.outputs)


class ExpertFactors(FactorPair):
    """Factors of experts that lie one below the other: held as stored, and cut expert by expert."""

    def __init__(
        self, low: LowRank, buffers: DeviceBuffers, *, transposed: bool, fixed: FixedPoint | None = None
    ) -> None:
        self._buffers, self._transposed, self._fixed = buffers, transposed, fixed
        self._height = low.inputs[0] if transposed else low.outputs
        self._A = buffers.stored(low.A).view(low.experts, low.rank, -1)  # one expert after another
        self._B = buffers.stored(low.B).view(low.outputs, low.rank, low.experts)  # the expert varies fastest
        self._expert = -1
        self._pair = (self._A, self._B)

    def _of(self, start: int) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of the expert that a row belongs to."""
        if self._expert != (expert := start // self._height):
            self._expert = expert
            A, B = self._pair = (self._buffers.computed(self._A[expert]), self._buffers.computed(self._B[:, :, expert]))
            if self._fixed:
                self._fixed.left_(A if self._transposed else B)
                self._fixed.right_(B if self._transposed else A)
        return self._pair

    def right(self, start: int) -> Tensor:
        """Return the right factor of the expert at `start`: (r, columns)."""
        A, B = self._of(start)
        return B.T if self._transposed else A

    def left(self, start: int, stop: int) -> Tensor:
        """Return rows of the left factor of the expert at `start`: (stop − start, r)."""
        A, B = self._of(start)
        first = start % self._height
        return (A.T if self._transposed else B)[first : first + stop - start]


@dataclass
class LoadedEdit:
    """One edit with its tensors, ready for any block of the stored weight."""

    edit: Edit
    factors: FactorPair | None = None
    shift: Tensor | None = None
    """The addend of a bias, (1, n)."""
    m: Tensor | None = None
    """The magnitudes of a DoRA."""
    n: list[Tensor] = field(default_factory=list)
    """The norms of a DoRA: one tensor per block, or one for all blocks if they run along the columns."""

    @classmethod
    def load(cls, edit: Edit, buffers: DeviceBuffers, fixed: FixedPoint | None = None) -> LoadedEdit:
        """Read the tensors that every block needs; factors are rounded to `fixed` if given."""
        if isinstance(edit.update, Delta):
            return cls(edit, shift=buffers.whole(edit.update.value))
        low = edit.low
        assert low
        kind = ExpertFactors if low.experts else StreamedFactors
        m = buffers.whole(edit.update.m).flatten() if isinstance(edit.update, Decomposed) else None
        return cls(edit, kind(low, buffers, transposed=edit.transposed, fixed=fixed), m=m)

    def is_finite(self) -> bool:
        """Return True if the last norms are finite: a division by an infinite norm hides an overflow."""
        return not self.n or maths.all_finite(self.n[-1])

    def add_(self, W: Tensor, start: int, stop: int, weight: float = 1.0) -> Tensor:
        """Compute W + w·s·BA in place; for a bias W + w·s·b."""
        if self.shift is not None and isinstance(self.edit.update, Delta):
            return W.add_(self.shift, alpha=weight * self.edit.update.scale)
        assert self.factors
        assert self.edit.low
        scale = weight * self.edit.low.scale
        return maths.add_low_rank_(W, self.factors.left(start, stop), self.factors.right(start), scale)

    def decompose_(self, W: Tensor, start: int, stop: int) -> Tensor:
        """Compute m·V/‖V‖ in place."""
        assert self.m is not None
        V = self.add_(W, start, stop)
        if self.edit.two_passes:
            return maths.rescale_(V, self.m, self.n[0], axis=0)
        self.n.append(maths.norms(V, axis=1))
        return maths.rescale_(V, self.m[start:stop], self.n[-1], axis=1)


def doubt_zeros(adapter: Adapter) -> str | None:
    """Return a warning if every lora_B has numbers in the same share of its rows only, all others being zero.

    Modules that are zero as a whole were not trained. The first module that has another share ends the search.
    """
    parts: list[int] = []
    with closing(Reader()) as reader:
        for change in adapter.changes:
            if not isinstance(change.update, LowRank | Decomposed):
                continue
            B = low_rank(change.update).B
            raw = torch.frombuffer(bytearray().join(reader.pieces(B)), dtype=TORCH[B.dtype])
            rows = raw.view(B.shape[0], -1).ne(0).any(dim=1).nonzero().flatten()
            if not len(rows):
                continue
            parts.append(round(B.shape[0] / len(rows)))
            in_one_run = int(rows[-1] - rows[0]) + 1 == len(rows)
            if parts[-1] not in PARTS or parts[-1] != parts[0] or not in_one_run:
                return None
    if len(parts) < 2:
        return None
    return (
        f"{parts[0] - 1}/{parts[0]} of the rows of every lora_B of {adapter.source.name} are exactly zero: "
        "a ZeRO-3 save of one rank looks like that"
    )


def check_magnitudes(plan: Plan) -> str | None:
    """Return a warning if DoRA magnitudes do not look like norms of this base, from a sample of its rows.

    Raises UnsupportedError if magnitudes were divided by the norms of their weights.
    """
    with closing(Reader()) as reader:
        buffers = DeviceBuffers(ComputeSpec(torch.device("cpu"), torch.float64, "sample"), reader)
        samples = {
            item.name: _sample(item.source, edit, edit.update, buffers)
            for item in plan.items
            for edit in item.edits
            if isinstance(edit.update, Decomposed)
        }
    _refuse_normalised(plan, samples)
    ratios = [(m / n - 1).abs() for m, n in samples.values()]
    if not ratios or (median := torch.cat(ratios).nanmedian().item()) <= OTHER_BASE:
        return None
    return (
        f"another base? The adapter's magnitudes differ from the norms of {plan.base.source.name} by "
        f"{median:.0%} in the median; those of its own base differ by a few percent."
    )


def _refuse_normalised(plan: Plan, samples: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raise UnsupportedError for modules whose magnitudes are near 1, and whose rows are not."""
    medians = {name: (m.nanmedian().item(), n.nanmedian().item()) for name, (m, n) in samples.items()}
    near = {name: (m, n) for name, (m, n) in medians.items() if _is_near_one(m, n)}
    others = [m / n for name, (m, n) in medians.items() if name not in near]
    if not near or (others and abs(statistics.median(others) - 1) > OTHER_BASE):
        return  # weights of another base explain the other modules
    if len(near) > 1:  # and so they do if m is as far from ‖W‖ in every module, rather than near 1 in every module
        m_differs = statistics.stdev(math.log(m) for m, _ in near.values())
        if m_differs > statistics.stdev(math.log(m / n) for m, n in near.values()):
            return
    faults = [
        Fault(name.removesuffix(".weight"), f"its magnitudes are {m:.2g} in the median, the rows of the base {n:.2g}")
        for name, (m, n) in near.items()
    ]
    names = ", ".join(adapter.source.name for adapter in plan.adapters)
    raise UnsupportedError(
        f"The magnitudes of {len(faults)} modules of {names} are normalised: divided by the norms of the rows.",
        faults=faults,
        hint="TensorRT-LLM's normalize_weights.py writes m/‖V‖ under the same name: name the adapter before that",
    )


def _is_near_one(m: float, n: float) -> bool:
    """Return True if magnitudes are near 1 in the median, and the norms of the rows are not."""
    is_far = n > 0 and abs(math.log(n)) > FAR
    return is_far and abs(m - 1) < NEAR_ONE and abs(math.log(m)) < abs(math.log(m / n)) / 2


def _sample(tensor: StoredTensor, edit: Edit, update: Decomposed, buffers: DeviceBuffers) -> tuple[Tensor, Tensor]:
    """Return m and ‖W‖ for some outputs of one weight."""
    m = buffers.whole(update.m).flatten()
    rows = tensor.matrix[0]
    wanted = SAMPLED_FOR_COLUMNS if edit.two_passes else SAMPLED_ROWS
    chosen = sorted({round(k * (rows - 1) / max(1, wanted - 1)) for k in range(min(wanted, rows))})
    sample = torch.cat([buffers.rows(tensor, row, row + 1) for row in chosen])
    if edit.two_passes:  # the norm of a column, estimated from some of its elements
        return m, maths.norms(sample, axis=0) * (rows / len(chosen)) ** 0.5
    return m[chosen], maths.norms(sample, axis=1)
