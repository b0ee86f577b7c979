"""Compute the addends Δ of W' = W + s·Δ that are not one product of two factors (docs/mathematics.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..deferred_imports import seeded


def kronecker_rows(
    one: Tensor,  # (a, b)
    other: Tensor,  # (c, d)
    start: int,
    stop: int,
) -> Tensor:  # (stop − start, b·d)
    """Return some rows of C₁ ⊗ C₂: row p·c + q is row p of C₁ ⊗ row q of C₂ (42)."""
    rows = torch.arange(start, stop, device=one.device)
    left, right = one[rows // len(other)], other[rows % len(other)]
    return torch.einsum("kb,kd->kbd", left, right).flatten(1)


def tucker(
    core: Tensor,  # (r, r', k)
    B: Tensor,  # (out, r)
    A: Tensor,  # (r', in)
) -> Tensor:  # (out, in·k)
    """Return Δ[o, i, t] = Σ core[m, n, t]·B[o, m]·A[n, i] (41)."""
    half = torch.einsum("mnt,ni->mit", core, A)
    return (B @ half.flatten(1)).view(len(B), -1)


def fourier(
    spectrum: Tensor,  # (n,)
    seed: int,
    shape: tuple[int, int],  # (out, in)
) -> Tensor:  # (out, in)
    """Return the real part of the inverse Fourier transform of a matrix of n seeded frequencies (44)."""
    generator = seeded(seed)
    places = torch.randperm(math.prod(shape), generator=generator)[: len(spectrum)]
    dense = spectrum.new_zeros(math.prod(shape))
    dense[places.to(spectrum.device)] = spectrum
    real: Tensor = torch.fft.ifft2(dense.view(shape)).real
    return real


def circulant(kernel: Tensor) -> Tensor:  # (m, n, b) → (m·b, n·b)
    """Return circulant blocks: block [i, j][p, q] is kernel[i, j, (q − p) mod b], all over n·b (45)."""
    m, n, b = kernel.shape
    steps = torch.arange(b, device=kernel.device)
    blocks = kernel[:, :, (steps[None, :] - steps[:, None]) % b]  # (m, n, b, b)
    return blocks.permute(0, 2, 1, 3).reshape(m * b, n * b) / (n * b)


def bounded(
    A: Tensor,  # (r, in)
    B: Tensor,  # (out, r)
    strength: Tensor,  # 1 element
    norms: Tensor,  # (in,)
) -> Tensor:  # (out, in)
    """Return Σ λ/r·bᵢaᵢ/(‖aᵢ‖‖bᵢ‖)·diag(norms), where a norm counts as 1e-4 at least: DeLoRA (46)."""
    lengths = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
    delta: Tensor = (B * (strength / len(A) / lengths)) @ (A * norms)
    return delta


def tiled(
    block: Tensor,  # (r, out), or (r, a part of out)
    shape: tuple[int, int],  # (out, in)
) -> Tensor:  # (out, in)
    """Return Δ[o, i] = block[i mod r, o mod its columns]: MiSS (47)."""
    outputs, inputs = shape
    rows = torch.arange(inputs, device=block.device) % block.shape[0]
    columns = torch.arange(outputs, device=block.device) % block.shape[1]
    delta: Tensor = block[rows][:, columns].T
    return delta


def random_bases(
    A: Tensor,  # (r, 1, at least the smaller side)
    B: Tensor,  # (at least the larger side, at least n, r)
    weights: Tensor,  # (r, n): λ
    scales: Tensor,  # (n, the smaller side): γ
    shape: tuple[int, int],  # (out, in)
) -> Tensor:  # (out, in)
    """Return Σ of n products of shared random bases, with diagonals λ and γ: RandLoRA (48)."""
    low, high = min(shape), max(shape)
    bases = weights.shape[1]
    left = B[:high, :bases, :].flatten(1)  # (high, n·r)
    right = (weights[:, :, None] * A[:, :, :low] * scales).flatten(0, 1)  # (r·n, low): PEFT has them in this order
    product = left @ right
    return product if low == shape[1] else product.T


def seeded_projections(
    seed: int,
    rank: int,
    largest: tuple[int, int],  # (out, in)
) -> tuple[Tensor, Tensor]:  # (in-side: (rank, in), out-side: (out, rank)), float32
    """Return VeRA's shared projections from PEFT's seed: uniform in ±√(6/columns), in the order A, B."""
    generator = seeded(seed)
    A = torch.empty(rank, largest[1], dtype=torch.float32, device="cpu")
    B = torch.empty(largest[0], rank, dtype=torch.float32, device="cpu")
    for matrix in (A, B):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(matrix.shape[1]))
        matrix.uniform_(-bound, bound, generator=generator)
    return A, B
