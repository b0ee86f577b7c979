"""Compute the best factors of what several adapters add to one weight together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..deferred_imports import seeded
from ..engine.combine import Combiner
from ..engine.device_buffers import DeviceBuffers
from ..engine.factors import StreamedFactors, apply_edits
from ..engine.tensor import SourceValues, load_edits, measure
from ..errors import NumericalError
from ..maths.lora import all_finite
from ..maths.svd import compared, resize, squared, truncated_svd
from .combined_change import CombinedChange
from .compress import EXACT, SAMPLES, ranks_for
from .run import Fitted, rounded


def compress_several(
    job: CombinedChange,
    buffers: DeviceBuffers,
    *,
    goal: Mapping[str, Any],
    exact: bool,
    single: bool,
    dtype: str | None,
) -> Fitted:
    """Return A (r, in, …) and B (out, r, …) with scaling 1, and their loss of the combined ΔW.

    LoRAs that are added up are put side by side, which loses nothing: their rank is the sum of their ranks.
    """
    change = None
    if job.lows:
        left, right = _side_by_side(job, buffers)
        factors = resize(left, right, **goal)
    else:
        change = _change(job, buffers, torch.float32 if single else buffers.spec.compute)
        factors = truncated_svd(change, exact=exact, **goal)
    B, A = factors.B, factors.A
    if not factors.rank:
        B, A = B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1])
    B, A = (rounded(x, dtype, job.name) for x in (B, A))
    like = torch.empty(0, dtype=buffers.spec.compute, device=buffers.spec.device)

    def rows(block: slice) -> Tensor:
        """Return rows of ΔW."""
        return left[block] @ right if change is None else change[block].to(like)

    lost, size = compared(rows, B.to(like), A.to(like))
    facts = {"change": size, "lost": lost, "output": 0.0, "output_lost": 0.0}
    if lost > EXACT**2 * size:
        x = torch.randn(A.shape[1], SAMPLES, generator=seeded(0)).to(like)
        whole = slice(0, len(B))
        facts["output_lost"] = squared((rows(whole) - B.to(like) @ A.to(like)) @ x)
        facts["output"] = squared(_outputs(job, buffers, x) + rows(whole) @ x)
    shape = job.item.source.shape
    inputs = shape[:1] if job.transposed else shape[1:]
    tensors = {"A": A.view(-1, *inputs), "B": B.view(*B.shape, *[1] * (len(inputs) - 1))}
    return Fitted(tensors, {"rank": len(A), **facts, **ranks_for(factors)})


def _side_by_side(job: CombinedChange, buffers: DeviceBuffers) -> tuple[Tensor, Tensor]:
    """Return the factors of Σ wᵢ·sᵢ·BᵢAᵢ: (out, Σ rᵢ) and (Σ rᵢ, in)."""
    lefts, rights = [], []
    for edit, low in zip(job.item.edits, job.lows, strict=True):
        factors = StreamedFactors(low, buffers, transposed=edit.transposed)
        left, right = factors.left(0, job.item.source.matrix[0]), factors.right(0)
        lefts.append((right.T if edit.transposed else left) * (edit.weight * low.scale))
        rights.append(left.T if edit.transposed else right)
    return torch.cat(lefts, dim=1), torch.cat(rights)


def _change(job: CombinedChange, buffers: DeviceBuffers, dtype: torch.dtype) -> Tensor:
    """Return the combined ΔW (out, in), rounded to `dtype` after the subtraction."""
    item, values = job.item, SourceValues(job.item, buffers)
    combiner = Combiner(item, buffers, values) if item.combination else None
    edits = combiner.edits if combiner else load_edits(item, buffers)
    if not combiner:
        measure(item, edits, values, buffers)
    D = torch.empty(item.source.matrix, dtype=dtype, device=buffers.spec.device)
    for start, stop in item.spans():
        W = values.block(buffers.raw(item.source, start, stop), start, stop)
        before = W.clone()
        after = combiner.apply(W, start, stop) if combiner else apply_edits(W, edits, start, stop)
        D[start:stop] = after - before
    if not all_finite(D):
        raise NumericalError(f"{job.name}: ΔW is not finite.", hint="--exclude leaves the module out")
    return D.T if job.transposed else D


def _outputs(job: CombinedChange, buffers: DeviceBuffers, x: Tensor) -> Tensor:
    """Return Wx, (out, samples)."""
    item, values = job.item, SourceValues(job.item, buffers)
    pieces = []
    for start, stop in item.spans():
        W = values.block(buffers.raw(item.source, start, stop), start, stop)
        pieces.append(W.T @ x[start:stop] if job.transposed else W @ x)
    return torch.stack(pieces).sum(0) if job.transposed else torch.cat(pieces)
