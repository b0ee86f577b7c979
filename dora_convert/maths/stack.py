"""Merge several weights of one shape in one call: the steps of `maths.lora`, without the interpreter's lock."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..scripted import Scripted
from .lora import round_bfloat16, to_odd_bits


@Scripted
def merge_stack(
    raw: Tensor,  # (weights · out, in), as stored
    A: Tensor,  # (weights, r, in), as stored
    B: Tensor,  # (weights, out, r), as stored
    scales: list[float],
    m: Tensor | None,  # (weights · out), in the dtype of arithmetic
    n: Tensor,  # as m: overwritten with the norms
    scratch: list[Tensor],  # memory for some weights: W, A, B in the dtype of arithmetic, W in float32, this as int16
    out: Tensor,  # as raw, in the dtype to round to
) -> bool:
    """Compute W + s·BA (1) of each weight, or m·(W + s·BA)/n (3), rounded once; return True if all is finite.

    As many weights are computed at a time as the scratch space holds.
    """
    W_, A_, B_, y_, halves_ = scratch
    count, rows, together = len(scales), raw.size(0) // len(scales), A_.size(0)
    finite = True
    for first in range(0, count, together):
        last = min(count, first + together)
        top, bottom = first * rows, last * rows
        height = bottom - top
        W, right, left = W_[:height], A_[: last - first], B_[: last - first]
        W.copy_(raw[top:bottom])
        right.copy_(A[first:last])
        left.copy_(B[first:last])
        for k in range(last - first):
            W[k * rows : (k + 1) * rows].addmm_(left[k], right[k], beta=1, alpha=scales[first + k])
        if m is not None:
            norms = n[top:bottom].copy_(torch.linalg.vector_norm(W, 2.0, [1]))
            W.mul_((m[top:bottom] / norms).unsqueeze(1))
            finite = finite and _all_finite(norms)
        rounded = out[top:bottom]
        if W.dtype != torch.float64 or rounded.element_size() > 2:
            rounded.copy_(W)
        elif rounded.dtype == torch.float16:
            odd = to_odd_bits(torch.view_copy(W, dtype=torch.int64))
            rounded.copy_(y_[:height].copy_(torch.view_copy(odd, dtype=torch.float64)))
        else:
            round_bfloat16(W, y_[:height], halves_[:height], rounded)
        finite = finite and _all_finite(rounded)
    return finite


def _all_finite(x: Tensor) -> bool:
    """Return True if no element is NaN or infinite; a finite sum proves it, but a sum may overflow."""
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())
