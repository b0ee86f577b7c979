"""Compute the best factors, of a rank or an error, of what an adapter adds to one weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapters import Delta, low_rank
from ..deferred_imports import seeded
from ..engine.device_buffers import DeviceBuffers
from ..engine.factors import LoadedEdit, StreamedFactors
from ..engine.precision import TORCH
from ..engine.tensor import SourceValues, measure
from ..errors import NumericalError
from ..maths import lora as maths
from ..maths.svd import BLOCK, Factors, compared, resize, squared, truncated_svd
from ..plan.item import Edit, Item
from .jobs import MatchedChange
from .run import Fitted, rounded

SAME = 1e-6
"""A DoRA whose m/‖V‖ differ from 1 by at most this is a LoRA: float32 magnitudes are no more exact."""
EXACT = 1e-6
"""The relative error of rounding factors to float32."""
SAMPLES = 8


def compress(
    job: MatchedChange,
    buffers: DeviceBuffers,
    *,
    goal: Mapping[str, Any],
    exact: bool,
    single: bool,
    dtype: str | None,
    biases: Mapping[str, Delta],
) -> Fitted:
    """Return A (r, in, …) and B (out, r, …) with scaling 1, and their loss of ΔW = apply(W) − W.

    `goal` is a rank, an energy or a max_error. With `single`, ΔW is held in single precision. `biases` are
    those on lora_B, by module; their scaling becomes 1, too.
    """
    weight = _AdaptedWeight(job, buffers)
    change = weight.change(torch.float32 if single else buffers.spec.compute)
    if change is None or weight.is_lora():
        left, right = weight.factors()
        factors = resize(left, right, **goal)
    else:
        factors = truncated_svd(change, exact=exact, **goal)
    B, A = factors.B, factors.A
    if not factors.rank:
        B, A = B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1])
    B, A = (rounded(x, dtype, job.name) for x in (B, A))

    def rows(block: slice) -> Tensor:
        """Return rows of ΔW."""
        return left[block] @ right if change is None else change[block].to(weight.like)

    lost = weight.lost(rows, B.to(weight.like), A.to(weight.like))
    shape, own = job.item.source.shape, low_rank(job.change.update)
    inputs = shape[:1] if job.edit.transposed else shape[1:]  # of A: (in, …)
    inputs = own.inputs if own and job.is_cut else inputs
    tensors = {"A": A.view(-1, *inputs), "B": B.view(*B.shape, *[1] * (len(inputs) - 1))}
    if bias := biases.get(job.name.rpartition(".")[0]):
        tensors["b"] = (bias.scale * buffers.whole(bias.value)).flatten().to(TORCH[dtype or "F32"])
    return Fitted(tensors, {"rank": len(A), **lost, **ranks_for(factors)})


def ranks_for(factors: Factors) -> dict[str, int | None]:
    """Return the ranks that smaller errors would need, and the number of singular values computed."""
    errors = {"one_percent": factors.rank_for(0.01), "one_permille": factors.rank_for(0.001)}
    return {**errors, "known": len(factors.S)}


class _AdaptedWeight:
    """A weight of the running model, and an adapter's change of it."""

    def __init__(self, job: MatchedChange, buffers: DeviceBuffers) -> None:
        self._job, self._buffers = job, buffers
        self._parts = [_AdaptedPart(job.name, item, edit, buffers) for item, edit in job.parts]
        self.like = torch.empty(0, dtype=buffers.spec.compute, device=buffers.spec.device)

    def change(self, dtype: torch.dtype) -> Tensor | None:
        """Return ΔW (out, in), rounded to `dtype` after the subtraction; None if ΔW is s·BA by definition."""
        if all(part.is_plain for part in self._parts):
            return None
        return self._joined(part.change(dtype) for part in self._parts)

    def _joined(self, parts: Iterator[Tensor]) -> Tensor:
        """Return rows of all outputs from those of the stored tensors, in the running model's order."""
        if not self._job.is_cut:
            return next(parts)
        whole = torch.empty(0)
        for number, part in enumerate(parts):
            whole = whole if number else part.new_empty(self._job.matrix[0], part.shape[1])
            whole[self._job.outputs(number)] = part
        return whole

    def is_lora(self) -> bool:
        """Return True for a DoRA whose magnitudes equal the norms of W + sBA."""
        return all(part.is_lora() for part in self._parts)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return s·B (out, r) and A (r, in), dense, with any diagonal in one of them."""
        if not self._job.is_cut:
            return self._parts[0].factors()
        low = low_rank(self._job.change.update)
        assert low
        factors = StreamedFactors(low, self._buffers, transposed=False)
        return low.scale * factors.left(0, low.outputs), factors.right(0)

    def lost(self, rows: Callable[[slice], Tensor], B: Tensor, A: Tensor) -> dict[str, float]:
        """Return ‖ΔW‖² and BA's loss of it; the same of W'x for random x, unless the loss is rounding."""
        lost, change = compared(rows, B, A)
        facts = {"change": change, "lost": lost, "output": 0.0, "output_lost": 0.0}
        if lost > EXACT**2 * change:
            x = torch.randn(A.shape[1], SAMPLES, generator=seeded(0)).to(B)
            height = max(1, BLOCK // A.shape[1])
            spans = [slice(start, start + height) for start in range(0, len(B), height)]
            facts["output_lost"] = squared(torch.cat([(rows(span) - B[span] @ A) @ x for span in spans]))
            facts["output"] = squared(self._joined(part.outputs(x) for part in self._parts))
            if not math.isfinite(facts["output"]):
                raise NumericalError(f"{self._job.item.name} holds NaN or Inf.", hint="is the base damaged?")
        return facts


class _AdaptedPart:
    """The outputs of a weight that one stored tensor holds, and an adapter's change of them."""

    def __init__(self, name: str, item: Item, edit: Edit, buffers: DeviceBuffers) -> None:
        self._name, self._item, self._edit, self._buffers = name, item, edit, buffers
        self._turned = edit.transposed
        self._operand, self._values = LoadedEdit.load(edit, buffers), SourceValues(item, buffers)
        measure(item, [self._operand], self._values, buffers)

    @property
    def is_plain(self) -> bool:
        """True if the change is s·BA by definition."""
        return self._operand.factors is not None and self._operand.m is None and not self._item.start

    def change(self, dtype: torch.dtype) -> Tensor:
        """Return ΔW of the outputs, (out, in), rounded to `dtype` after the subtraction."""
        D = torch.zeros(self._item.source.matrix, dtype=dtype, device=self._buffers.spec.device)
        for start, stop in self._item.spans():
            raw = self._buffers.raw(self._item.source, start, stop)
            W = self._values.block(raw, start, stop)
            before = self._buffers.computed(raw) if self._item.start else W.clone()
            D[start:stop] = self._applied(W, start, stop) - before
        if not maths.all_finite(D):
            raise NumericalError(
                f"{self._name}: ΔW is not finite: W + sBA has outputs whose weights are all zero, "
                "or W holds NaN or Inf.",
                hint="--exclude leaves the module out",
            )
        D = self._operand.own(D, 0, len(D))
        return D.T if self._turned else D

    def is_lora(self) -> bool:
        """Return True for a DoRA whose magnitudes equal the norms of W + sBA."""
        m, n = self._operand.m, self._operand.n
        if m is None or not n or not self._operand.factors or self._item.start:
            return False
        return bool((m / torch.cat(n) - 1).abs().max() <= SAME)

    def _applied(self, W: Tensor, start: int, stop: int) -> Tensor:
        """Return a block of W' for a block of W, which is overwritten."""
        return self._operand.apply_(W, start, stop)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return s·B (out, r) and A (r, in), dense, with any diagonal in one of them."""
        assert self._operand.factors
        assert self._edit.low
        left = self._operand.factors.left(0, self._item.source.matrix[0])
        right = self._operand.factors.right(0)
        s = self._edit.low.scale
        return (s * right.T, left.T) if self._turned else (s * left, right)

    def outputs(self, x: Tensor) -> Tensor:
        """Return W'x of the outputs, (out, samples)."""
        pieces = []
        for start, stop in self._item.spans():
            W = self._values.block(self._buffers.raw(self._item.source, start, stop), start, stop)
            W = self._operand.own(self._applied(W, start, stop), start, stop)
            pieces.append(W.T @ x[start:stop] if self._turned else W @ x)
        return torch.stack(pieces).sum(0) if self._turned else torch.cat(pieces)
