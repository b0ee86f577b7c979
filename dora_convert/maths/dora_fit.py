"""Fit a DoRA to a weight W and its fine-tuned self W': m, B and A with m·V/‖V‖ ≈ W', where V = W + BA.

With d = m/‖V‖, DoRA's weight is diag(d)·W + diag(d)·BA, and Z = diag(d)·BA may be any matrix of rank r. So
the best DoRA has the scales d that bring W' − diag(d)·W closest to rank r. The distance is measured in W', so
no d makes the distance small by making everything small. Given d, a truncated SVD of the difference gives B
and A, and least squares give m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .row_scales import RowScales, dots, find_scales
from .svd import BLOCK, Goal, noise_of, resize, squared, truncated_svd

SMALL = 1 << 20  # elements: matrices up to this size are computed in float64
FIRST, LAST = 4, 128  # the least and the largest rank of the search for scales that reach an error
USEFUL = 0.9  # of a LoRA's distance at the same rank: the search ends with scales that leave more
NO_SCALE = 1e-4  # of ‖w'‖/‖w‖: a smaller |d| would make B huge
LARGEST = 10  # of ‖w'‖/‖w‖: a larger |d| would make V a small difference of W and BA, which PEFT's arithmetic loses


@dataclass(frozen=True)
class DoraFactors:
    """m, B and A, and the errors of the fit. The scaling is 1."""

    B: Tensor
    """(out, rank)"""
    A: Tensor
    """(rank, in)"""
    m: Tensor
    """(out,), negative for flipped rows"""
    error: float
    """‖m·V/‖V‖ − W'‖/‖W'‖, measured"""
    delta_error: float
    """the same distance relative to ‖W' − W‖, as a LoRA's error is"""
    change: float
    """‖W' − W‖"""
    converged: bool
    """True if the search for the scales ended by itself"""
    steps: int
    """the steps of the search, over all starts"""

    @property
    def rank(self) -> int:
        """The columns of B; 0 if W' is W."""
        return self.B.shape[1]


def extract_dora(
    W: Tensor,  # (out, in)
    tuned: Tensor,  # W', (out, in)
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    exact: bool = False,
    store: Callable[[Tensor], Tensor] | None = None,
) -> DoraFactors:
    """Return the DoRA nearest to W' of a given rank, or of about the least rank that reaches a goal.

    `energy` and `max_error` are goals for W' − W. The rank is 0 if W' is W, and at least 1 otherwise. A
    distance of a unit of the dtype's precision, relative to ‖W'‖, counts as rounding. Matrices of up to SMALL
    elements are computed in float64. `store` rounds B and A as they will be stored, before m is fitted to them.
    """
    goal, dtype = Goal.of(rank, energy, max_error), W.dtype
    if W.numel() <= SMALL and W.device.type != "mps":
        W, tuned = W.double(), tuned.double()
    change, size = sum(squared(w - t) for w, t in _blocks(W, tuned)) ** 0.5, squared(tuned) ** 0.5
    if change == 0:
        B, A = W.new_zeros(len(W), 0, dtype=dtype), W.new_zeros(0, W.shape[1], dtype=dtype)
        return DoraFactors(
            B, A, dots(W, W).sqrt().to(dtype), error=0.0, delta_error=0.0, change=0.0, converged=True, steps=0
        )
    rounding = torch.finfo(dtype).eps * size
    allowed = max(goal.error * change, rounding)
    scales = find_scales(W, tuned, goal.rank, rounding) if goal.rank else _least(W, tuned, allowed, rounding)
    B, A = _factors(W, tuned, scales.d, rank=goal.rank, allowed=allowed, exact=exact)
    B, A = (store(x) if store else x.to(dtype) for x in (B, A))
    m, distance = _magnitudes(W, tuned, B, A, dtype)
    return DoraFactors(
        B,
        A,
        m,
        error=distance / size if size else float(distance > 0),
        delta_error=distance / change,
        change=change,
        converged=scales.converged,
        steps=scales.steps,
    )


def _least(W: Tensor, tuned: Tensor, allowed: float, rounding: float) -> RowScales:
    """Return the scales of about the least rank whose distance is allowed.

    The search ends at rank LAST, or when scales are of little use: larger ranks need the same scales.
    """
    low, rank, most = 0, min(FIRST, *W.shape), min(LAST, *W.shape)
    scales = find_scales(W, tuned, rank, rounding)
    while allowed < scales.distance < USEFUL * scales.unscaled and rank < most:
        low, rank = rank, min(2 * rank, most)
        scales = find_scales(W, tuned, rank, rounding)
    while rank - low > 1 and scales.distance <= allowed:
        middle = (low + rank) // 2
        less = find_scales(W, tuned, middle, rounding)
        if less.distance <= allowed:
            scales, rank = less, middle
        else:
            low = middle
    return scales


def _factors(
    W: Tensor, tuned: Tensor, d: Tensor, *, rank: int | None, allowed: float, exact: bool
) -> tuple[Tensor, Tensor]:
    """Return B and A for scales d, which are clamped so that B stays finite and V keeps its precision."""
    old, new = dots(W, W).sqrt(), dots(tuned, tuned).sqrt()
    ratio = new / torch.where(old > 0, old, 1.0)
    d = d.abs().clamp(NO_SCALE * ratio, LARGEST * ratio).copysign(d)
    d = torch.where(new > 0, d, 0.0)  # rows of zeros have m = 0, and their B is free
    M = torch.addcmul(tuned, d[:, None].to(W), W, value=-1)
    size = squared(M) ** 0.5
    noise = max(noise_of(M), allowed / size) if size else 0.0
    goal = {"rank": rank} if rank else {"max_error": min(1.0, noise)}
    Z = truncated_svd(M, **goal, exact=exact, noise=noise if rank else None)
    if not Z.rank:
        return W.new_zeros(len(W), 1), W.new_zeros(1, W.shape[1])
    B = Z.B / torch.where(d == 0, 1.0, d)[:, None].to(W)
    B[new == 0] = 0
    even = resize(B, Z.A, rank=Z.rank, noise=0.0)
    # PEFT divides by ‖V‖, so V must not be zero even if W and W' are.
    even.B[(old == 0) & (new == 0)] = even.B.abs().mean()
    return even.B, even.A


def _magnitudes(W: Tensor, tuned: Tensor, B: Tensor, A: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return m = ⟨W', V⟩/‖V‖ per row, by least squares, and ‖m·V/‖V‖ − W'‖, both for the given B and A."""
    parts, rest = [], 0.0
    wide = torch.float32 if W.device.type == "mps" else torch.float64
    for rows in _blocks(W, tuned, B):
        w, t, b = (x.to(wide) for x in rows)
        V = w + b @ A.to(wide)
        n = dots(V, V).sqrt()
        n = torch.where(n > 0, n, 1.0)
        m = (dots(t, V) / n).to(dtype)
        parts.append(m)
        rest += squared(torch.addcmul(t, (m / n)[:, None].to(V), V, value=-1))
    return torch.cat(parts), rest**0.5


def _blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of each matrix, a block at a time."""
    height = max(1, BLOCK // max(1, matrices[0].shape[1]))
    return zip(*(torch.split(matrix, height) for matrix in matrices), strict=True)
