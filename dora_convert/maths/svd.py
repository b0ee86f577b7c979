"""Factor a matrix into low-rank factors: the truncated SVD, and LoRAs of another rank.

D is (out, in), B is (out, r), A is (r, in). The singular values are split evenly, B = U√S and A = √S·Vᵀ. All
functions compute in the dtype and on the device of their arguments. Random numbers come from a generator with
a fixed seed, so that the same input gives the same bits. The error of the factors is always measured against
D, block by block.

Large matrices are factored by subspace iteration from a random start: Halko, Martinsson and Tropp,
arXiv:0909.4061, algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..deferred_imports import seeded

EXACT_UP_TO = 512  # rows or columns, whichever are fewer: LAPACK takes about a tenth of a second
OVERSAMPLE = 10  # more columns than the rank: they speed convergence up, and are cut off at the end
ITERATIONS = 64  # at most; a handful are usual
SETTLED = 3e-4  # stop when a round improves the squared error by less than this share
FIRST = 32  # the first rank that is tried for a goal of an error
BLOCK = 1 << 21  # elements that are compared at once


@dataclass(frozen=True)
class Factors:
    """Low-rank factors, and their error."""

    B: Tensor
    """(out, rank)"""
    A: Tensor
    """(rank, in)"""
    error: float
    """‖D − BA‖/‖D‖, Frobenius, measured; 0 if D is zero"""
    S: Tensor
    """the computed singular values, float64, falling: all of D's, or more than the rank"""
    errors: Tensor
    """(len(S) + 1,), float64: the relative error that rank 0, 1, … leaves"""
    exact: bool
    """True if S has all singular values that are not zero"""

    @property
    def rank(self) -> int:
        """The columns of B: at most the rank asked for, 0 if D is zero."""
        return self.B.shape[1]

    def rank_for(self, error: float) -> int | None:
        """Return the least rank with at most this error, or None for a rank above `len(S)`."""
        enough = (self.errors <= error).nonzero()
        return int(enough[0]) if len(enough) else None


@dataclass(frozen=True)
class Goal:
    """The goal of a factorisation: a rank, or an error."""

    rank: int | None
    error: float

    @classmethod
    def of(cls, rank: int | None = None, energy: float | None = None, max_error: float | None = None) -> Goal:
        """Make a goal of a rank, of a share of squared singular values, or of a largest relative error.

        Raises ValueError for none, for several, and for impossible values.
        """
        if sum(value is not None for value in (rank, energy, max_error)) != 1:
            raise ValueError("one of rank, energy and max_error is needed, and only one")
        if rank is not None and rank < 1:
            raise ValueError(f"rank {rank}: a rank is 1 or more")
        for name, share in (("energy", energy), ("max_error", max_error)):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} {share}: a share lies between 0 and 1")
        return cls(rank, (1 - energy) ** 0.5 if energy is not None else max_error or 0.0)


def truncated_svd(
    D: Tensor,  # (out, in)
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    exact: bool = False,
    noise: float | None = None,
) -> Factors:
    """Return the best factors of D of a given rank, or of the least rank that keeps an energy or an error.

    The rank is at most min(out, in), and at most D's numerical rank: the least that leaves a relative error
    of `noise`, by default 1.5·√min(out, in) units of the dtype's precision. A zero D has factors of rank 0. A
    goal below the dtype's precision gives the numerical rank; `error` is the error that this rank reaches.
    """
    goal, least = Goal.of(rank, energy, max_error), min(D.shape)
    noise = noise_of(D) if noise is None else noise
    width = goal.rank or FIRST
    start: Tensor | None = None
    while not exact and least > EXACT_UP_TO and width + OVERSAMPLE <= least // 4:
        U, Q, R = subspace(D, width, goal, start)
        left, S, right = torch.linalg.svd(R.T)
        beyond, _ = compared(lambda rows: D[rows], U, (Q @ R).T)
        svd = (U @ left, S, right @ Q.T)
        factors = _split(svd, lambda rows: D[rows], goal, beyond=beyond, noise=noise, dtype=D.dtype)
        if goal.rank or factors.rank <= width:
            return factors
        width, start = 2 * width, Q
    svd = torch.linalg.svd(D, full_matrices=False)
    return _split(svd, lambda rows: D[rows], goal, noise=noise, dtype=D.dtype)


def resize(
    B: Tensor,  # (out, r)
    A: Tensor,  # (r, in)
    s: float = 1.0,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    noise: float | None = None,
) -> Factors:
    """Return the best factors of s·BA, with a scaling of 1, by QR of B and Aᵀ and an SVD of (r, r); exact.

    Computed in float64 if the device has float64, and returned in the dtype of B.
    """
    goal, noise = Goal.of(rank, energy, max_error), noise_of(B) if noise is None else noise
    wide = torch.float32 if B.device.type == "mps" else torch.float64
    left, right = s * B.to(wide), A.to(wide)
    (QB, RB), (QA, RA) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(RB @ RA.T, full_matrices=False)
    svd = (QB @ U, S, Vh @ QA.T)
    return _split(svd, lambda rows: left[rows] @ right, goal, noise=noise, dtype=B.dtype)


def noise_of(D: Tensor) -> float:
    """Return the relative error of D that counts as rounding."""
    return 1.5 * math.sqrt(min(D.shape)) * torch.finfo(D.dtype).eps


def relative_error(
    rows: Callable[[slice], Tensor],
    B: Tensor,  # (out, r)
    A: Tensor,  # (r, in)
) -> float:
    """Return ‖D − BA‖/‖D‖, block by block, summed in float64; `rows` returns rows of D; 0 for a zero D."""
    rest, total = compared(rows, B, A)
    return (rest / total) ** 0.5 if total else 0.0


def squared(x: Tensor) -> float:
    """Return ‖x‖², summed in float64 if the device has float64."""
    wide = None if x.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(x, dtype=wide).square())


def compared(rows: Callable[[slice], Tensor], B: Tensor, A: Tensor) -> tuple[float, float]:
    """Return ‖D − BA‖² and ‖D‖²."""
    rest = total = 0.0
    height = max(1, BLOCK // max(1, A.shape[1]))
    for start in range(0, len(B), height):
        block = slice(start, start + height)
        D = rows(block)
        total += squared(D)
        rest += squared(D - (B[block] @ A).to(D.dtype))
    return rest, total


def subspace(D: Tensor, width: int, goal: Goal, start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, k), Q (in, k), R (k, k); U(QR)ᵀ is D on about its first `width` singular vectors.

    k is `width` + OVERSAMPLE; `start` holds the columns of an earlier Q. A goal of an error is given up early
    if the width is far too small.
    """
    generator = seeded(0)
    new = width + OVERSAMPLE - (0 if start is None else start.shape[1])
    Q = torch.randn(D.shape[1], new, generator=generator, dtype=torch.float32).to(D)
    Q = torch.linalg.qr(Q if start is None else torch.cat((start, Q), dim=1)).Q
    total, before = squared(D), float("inf")
    for round_ in range(ITERATIONS):
        U = torch.linalg.qr(D @ Q).Q
        Q, R = torch.linalg.qr(D.T @ U)
        rest = max(total - squared(torch.linalg.svdvals(R)[:width]), 0.0)
        hopeless = goal.rank is None and round_ == 2 and rest > 2 * goal.error**2 * total
        if hopeless or before - rest <= max(SETTLED * rest, torch.finfo(D.dtype).eps * total):
            break
        before = rest
    return U, Q, R


def _split(
    svd: tuple[Tensor, Tensor, Tensor],  # U (out, k), its columns orthonormal, S (k,), falling, Vᵀ (k, in)
    rows: Callable[[slice], Tensor],  # of D
    goal: Goal,
    *,
    beyond: float = 0.0,  # ‖D − USVᵀ‖²
    noise: float,
    dtype: torch.dtype,
) -> Factors:
    """Return the factors of the least rank that reaches the goal, as measured."""
    U, S, Vh = svd
    values = S.cpu().double()
    tails = torch.cat((values.square().flip(0).cumsum(0).flip(0), torch.zeros(1))) + beyond
    errors = (tails / tails[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    fits = (errors <= max(goal.error, noise)).nonzero()
    most = min(len(S), goal.rank or len(S))
    least = min(int(fits[0]), most) if len(fits) else most
    for rank in range(least, most + 1):
        root = S[:rank].sqrt()
        B, A = (U[:, :rank] * root).to(dtype), (root[:, None] * Vh[:rank]).to(dtype)
        error = relative_error(rows, B, A)
        if error <= goal.error or goal.rank or goal.error <= noise:
            break
    return Factors(B, A, error, values, errors, exact=beyond == 0)
