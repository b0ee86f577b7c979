"""to-lora's arithmetic: what an adapter adds to one weight, as the best factors of a rank or an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapters.updates import Delta
from ..engine.device_buffers import DeviceBuffers
from ..engine.factors import LoadedEdit
from ..engine.precision import TORCH
from ..engine.tensor import SourceValues, measure
from ..errors import NumericalError
from ..maths import lora as maths
from ..maths.svd import BLOCK, Factors, compared, resize, squared, truncated_svd
from .jobs import MatchedChange
from .run import Made, rounded

Rows = Callable[[slice], Tensor]

SAME = 1e-6
"""A DoRA whose m/‖V‖ differ from 1 by no more than this is a LoRA: float32 has magnitudes no better."""
EXACT = 1e-6
"""A relative error that is the rounding of factors to float32."""
SAMPLES = 8


def compress(
    job: MatchedChange,
    buffers: DeviceBuffers,
    *,
    goal: Mapping[str, Any],
    exact: bool,
    single: bool,
    dtype: str | None,
    shifts: Mapping[str, Delta],
) -> Made:
    """A (r, in, …) and B (out, r, …) with scaling 1, and what they lose of ΔW = apply(W) − W.

    `goal` is a rank, an energy or a max_error; ΔW is held in single precision where `single` is set. `shifts` are the
    biases of lora_B by their module, whose scaling becomes 1, too.
    """
    weight = _Weight(job, buffers)
    change = weight.change(torch.float32 if single else buffers.spec.compute)
    if change is None or weight.is_lora():
        left, right = weight.factors()
        made = resize(left, right, **goal)
    else:
        made = truncated_svd(change, exact=exact, **goal)
    B, A = _stored(job, made, dtype)

    def rows(block: slice) -> Tensor:
        return left[block] @ right if change is None else change[block].to(weight.like)

    facts: dict[str, Any] = weight.lost(rows, B.to(weight.like), A.to(weight.like))
    facts |= {"rank": A.shape[0], "known": len(made.S), "complete": made.exact}
    facts |= {"one_percent": made.rank_for(0.01), "one_permille": made.rank_for(0.001)}
    inputs = weight.inputs
    tensors = {"A": A.view(A.shape[0], *inputs), "B": B.view(*B.shape, *[1] * (len(inputs) - 1))}
    if shift := shifts.get(job.name.rpartition(".")[0]):
        tensors["b"] = (shift.scale * buffers.whole(shift.value)).flatten().to(TORCH[dtype or "F32"])
    return Made(tensors, facts)


class _Weight:
    """A weight, and what an adapter does to it."""

    def __init__(self, job: MatchedChange, buffers: DeviceBuffers) -> None:
        self._job, self._item, self._buffers = job, job.item, buffers
        self._turned = job.edit.transposed
        self._operand, self._values = LoadedEdit.load(job.edit, buffers), SourceValues(job.item, buffers)
        self.like = torch.empty(0, dtype=buffers.spec.compute, device=buffers.spec.device)
        measure(self._item, [self._operand], self._values, buffers)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The shape of a row of A: (in, …)."""
        shape = self._item.source.shape
        return (shape[0],) if self._turned else shape[1:]

    def change(self, dtype: torch.dtype) -> Tensor | None:
        """ΔW (out, in), rounded to `dtype` after the subtraction; None where it is s·BA by definition."""
        if self._operand.m is None and not self._item.start:
            return None
        D = torch.empty(self._item.source.matrix, dtype=dtype, device=self._buffers.spec.device)
        for start, stop in self._item.spans():
            raw = self._buffers.raw(self._item.source, start, stop)
            W = self._values.block(raw, start, stop)
            before = self._buffers.computed(raw) if self._item.start else W.clone()
            D[start:stop] = self._applied(W, start, stop) - before
        if not maths.all_finite(D):
            raise NumericalError(
                f"{self._job.name}: ΔW is not finite: W + sBA has outputs whose weights are all zero, or W holds NaN "
                "or Inf.",
                hint="--exclude leaves the module out",
            )
        return D.T if self._turned else D

    def is_lora(self) -> bool:
        """Whether it is a DoRA whose magnitudes are the norms that it would have without them."""
        m, n = self._operand.m, self._operand.n
        return m is not None and not self._item.start and bool((m / torch.cat(n) - 1).abs().max() <= SAME)

    def _applied(self, W: Tensor, start: int, stop: int) -> Tensor:
        if self._operand.m is None:
            return self._operand.add_(W, start, stop)
        return self._operand.decompose_(W, start, stop)

    def factors(self) -> tuple[Tensor, Tensor]:
        """s·B (out, r) and A (r, in), dense, with any diagonal in one of them."""
        assert self._operand.factors
        assert self._job.edit.low
        left = self._operand.factors.left(0, self._item.source.matrix[0])
        right = self._operand.factors.right(0)
        s = self._job.edit.low.scale
        return (s * right.T, left.T) if self._turned else (s * left, right)

    def lost(self, rows: Rows, B: Tensor, A: Tensor) -> dict[str, float]:
        """‖ΔW‖² and what BA loses of it; the same of the outputs W'x for some random inputs x, where that is anything."""
        lost, change = compared(rows, B, A)
        facts = {"change": change, "lost": lost, "output": 0.0, "output_lost": 0.0}
        if lost > EXACT**2 * change:
            x = torch.randn(A.shape[1], SAMPLES, generator=torch.Generator().manual_seed(0)).to(B)
            height = max(1, BLOCK // A.shape[1])
            spans = [slice(start, start + height) for start in range(0, len(B), height)]
            facts["output_lost"] = squared(torch.cat([(rows(span) - B[span] @ A) @ x for span in spans]))
            facts["output"] = squared(self._outputs(x))
            if not math.isfinite(facts["output"]):
                raise NumericalError(f"{self._item.name} holds NaN or Inf.", hint="is the base damaged?")
        return facts

    def _outputs(self, x: Tensor) -> Tensor:
        """W'x, (out, samples)."""
        pieces = []
        for start, stop in self._item.spans():
            W = self._values.block(self._buffers.raw(self._item.source, start, stop), start, stop)
            W = self._applied(W, start, stop)
            pieces.append(W.T @ x[start:stop] if self._turned else W @ x)
        return torch.stack(pieces).sum(0) if self._turned else torch.cat(pieces)


def _stored(job: MatchedChange, made: Factors, dtype: str | None) -> tuple[Tensor, Tensor]:
    """B and A as they will be stored: rounded once, and of rank 1 where nothing is left."""
    B, A = made.B, made.A
    if not made.rank:
        B, A = B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1])
    wanted = TORCH[dtype or "F32"]
    return rounded(B.double(), wanted, job.name), rounded(A.double(), wanted, job.name)
