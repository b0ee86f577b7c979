"""Search the row scales d that bring W' − diag(d)·W as close to rank r as possible.

For each d the best matrix of rank r is a truncated SVD, Z = USVᵀ, so only d is searched. The method is Gauss
and Newton's with Levenberg and Marquardt's damping on φ(d) = ‖W' − diag(d)·W − Z‖² (variable projection:
Golub and Pereyra, 1973). With b = W(I − VVᵀ) and h = ‖b‖² per row, a step δ solves

    (diag(h) − (UUᵀ)∘(bbᵀ))·δ = diag((I − UUᵀ)(W' − diag(d)·W)·bᵀ)

by conjugate gradients, whose products need W and not b. Without the second term on the left, the step
alternates between scales and factors, which takes tens to hundreds of rounds or stops on a plateau. With the
term, three or four rounds are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..deferred_imports import seeded
from .svd import OVERSAMPLE, Goal, compared, squared, subspace

EXACT_UP_TO = 128  # rows or columns, whichever are fewer: up to here LAPACK's SVD is as fast as a subspace step
STEPS = 1000  # from one start, at most
SETTLED = 1e-7  # a relative change of the squared distance that counts as none
STARTS = 12  # at most
MANY = 1 << 16  # elements, of all starts together, beyond the second start
INNER = 200  # rounds of conjugate gradients, at most
ACCURATE = 1e-5  # the relative residual of conjugate gradients
ROWS = 256  # summed in float64 at once


@dataclass(frozen=True)
class RowScales:
    """Scales, and the facts about their search."""

    d: Tensor
    """(out,), float64"""
    distance: float
    """‖W' − diag(d)·W − Z‖"""
    unscaled: float
    """the same for d = 1, as for a LoRA"""
    steps: int
    """Gauss–Newton steps from all starts"""
    converged: bool
    """True if the search ended by itself, before STEPS were used up"""


def find_scales(
    W: Tensor,  # (out, in)
    tuned: Tensor,  # W', (out, in)
    rank: int,
    rounding: float,
) -> RowScales:
    """Return the best scales of several starts; a distance of `rounding` ends the search.

    The first start is the better of d = 1, which is LoRA, and the least-squares ratio of the rows. Further
    starts are ratios of norms and random scales nearby, because small matrices of a large rank have local
    minima.
    """
    search = _Search(W, tuned, min(rank, *W.shape))
    ratio = search.ratio()
    plain, scaled = search.fit(torch.ones_like(ratio)), search.fit(ratio)
    best, steps, converged = search.run(scaled if scaled.loss < plain.loss else plain)
    for d in _others(search, ratio):
        if best.loss <= rounding**2:
            break
        fit, more, ended = search.run(search.fit(d))
        steps += more
        if fit.loss < best.loss:
            best, converged = fit, ended
    return RowScales(best.d, best.loss**0.5, plain.loss**0.5, steps, converged)


def dots(x: Tensor, y: Tensor) -> Tensor:
    """Return ⟨x, y⟩ row by row, in float64 if the device has float64."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    pairs = zip(torch.split(x, ROWS), torch.split(y, ROWS), strict=True)
    return torch.cat([(a.to(wide) * b.to(wide)).sum(dim=1) for a, b in pairs])


@dataclass
class _Fit:
    """Scales d, the subspaces U and V of the best Z, and φ(d)."""

    d: Tensor  # (out,)
    M: Tensor  # W' − diag(d)·W
    U: Tensor  # (out, r)
    V: Tensor  # (in, r)
    basis: Tensor | None  # (in, k): V and more, the start of the next subspace
    loss: float


class _Search:
    """The search for a minimum of φ from one start."""

    def __init__(self, W: Tensor, tuned: Tensor, rank: int) -> None:
        self.W, self.tuned, self.rank = W, tuned, rank
        self.floor = (2 * torch.finfo(W.dtype).eps) ** 2 * squared(tuned)
        self.squares = dots(W, W)

    def ratio(self) -> Tensor:
        """Return the d that brings diag(d)·W nearest to W'; 1 for rows of zeros."""
        some = self.squares > 0
        return torch.where(some, dots(self.W, self.tuned) / torch.where(some, self.squares, 1.0), 1.0)

    def fit(self, d: Tensor, start: Tensor | None = None) -> _Fit:
        """Compute the best Z for d, from an earlier basis."""
        M = torch.addcmul(self.tuned, d[:, None].to(self.W), self.W, value=-1)
        r, least = self.rank, min(M.shape)
        if least <= EXACT_UP_TO or r + OVERSAMPLE > least // 2:
            U, S, Vh = torch.linalg.svd(M, full_matrices=False)
            return _Fit(d, M, U[:, :r], Vh[:r].T, basis=None, loss=squared(S[r:]))
        U, Q, R = subspace(M, r, Goal(r, 0.0), start)
        left, S, right = torch.linalg.svd(R.T)
        beyond, _ = compared(lambda rows: M[rows], U, (Q @ R).T)
        return _Fit(d, M, U @ left[:, :r], Q @ right[:r].T, basis=Q, loss=beyond + squared(S[r:]))

    def run(self, fit: _Fit) -> tuple[_Fit, int, bool]:
        """Return the last fit of a search, the number of steps, and True if the search converged."""
        damping = 1e-3
        for step in range(STEPS):
            better, damping = self.step(fit, damping)
            if better is None:
                return fit, step, True
            gain, fit = fit.loss - better.loss, better
            if gain <= SETTLED * fit.loss:
                return fit, step + 1, True
        return fit, STEPS, False

    def step(self, fit: _Fit, damping: float) -> tuple[_Fit | None, float]:
        """Return a better fit, or None if there is none nearby, and the damping for the next step."""
        while fit.loss > self.floor and damping < 1e4:
            delta, gain = self.direction(fit, damping)
            if gain <= 2 * SETTLED * fit.loss:
                break
            better = self.fit(fit.d + delta, fit.basis)
            if better.loss <= fit.loss:
                return better, max(damping / 4, 1e-12)
            damping *= 8
        return None, damping

    def direction(self, fit: _Fit, damping: float) -> tuple[Tensor, float]:
        """Return the damped Gauss–Newton step δ, (out,), and the expected decrease of φ."""
        U, V, W = fit.U, fit.V, self.W
        WV, MU = W @ V, fit.M.T @ U
        h = self.squares - dots(WV, WV)
        free = h > 64 * torch.finfo(W.dtype).eps * self.squares
        h = torch.where(free, h, 1.0)
        g = dots(fit.M, W) - dots(fit.M @ V, WV) - dots(U, W @ MU - WV @ (V.T @ MU))

        def curvature(x: Tensor) -> Tensor:
            left = U * x[:, None].to(U)
            t = W.T @ left - V @ (WV.T @ left)
            return torch.where(free, (1 + damping) * h * x - dots(U, W @ t), 0.0)

        g = torch.where(free, g, 0.0)
        delta = _conjugate_gradients(curvature, g, h)
        return delta, float(delta @ g)


def _others(search: _Search, ratio: Tensor) -> Iterator[Tensor]:
    """Yield more starts: one for large matrices, several for small ones."""
    lengths = dots(search.tuned, search.tuned).sqrt()
    some = search.squares > 0
    yield torch.where(some, lengths / torch.where(some, search.squares, 1.0).sqrt(), 1.0) * ratio.sign()
    generator = seeded(0)
    for start in range(min(STARTS - 2, MANY // search.W.numel())):
        spread = (0.03, 0.1, 0.3)[start % 3]
        noise = torch.randn(len(ratio), generator=generator, dtype=torch.float32).to(ratio)
        yield ratio * (1 + spread * noise)


def _conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, diagonal: Tensor) -> Tensor:
    """Solve product(x) = b for x, for a positive product whose diagonal is about `diagonal`."""
    x, r = torch.zeros_like(b), b
    z = r / diagonal
    p, size = z, float(r @ z)
    target = size * ACCURATE**2
    for _ in range(INNER):
        q = product(p)
        curved = float(p @ q)
        if size <= target or curved <= 0:
            break
        x, r = x + size / curved * p, r - size / curved * q
        z = r / diagonal
        before, size = size, float(r @ z)
        p = z + size / before * p
    return x
