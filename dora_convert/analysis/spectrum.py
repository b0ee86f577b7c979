"""Compute the stable and the effective rank of ΔW from its blocks: from factors, a Gram matrix, or a sketch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..deferred_imports import seeded
from ..engine.device_buffers import DeviceBuffers
from ..engine.factors import LoadedEdit
from .modules import SKETCH, AnalysedModule

SMALL = 256
"""Gram matrices up to this size are held in the compute dtype, larger ones in float32."""
STEPS = 40
"""Lanczos steps: σ₁² is exact to a millionth even if σ₂² is less than it by a percent only."""


class Spectrum(ABC):
    """The squares of singular values of ΔW, or of each expert's ΔW, collected block by block."""

    estimated = False
    complete = True
    """True if all singular values are computed, not σ₁ alone."""

    def __init__(self) -> None:
        self._stable: list[float] = []
        self._effective: list[float | None] = []

    @abstractmethod
    def add(self, D: Tensor, start: int, stop: int) -> None:
        """Add a block of rows of ΔW."""

    @abstractmethod
    def squares(self) -> tuple[Tensor, float]:
        """Return the squares of singular values, as far as known, and ‖ΔW‖²; begin the next matrix."""

    def end(self) -> None:
        """End a matrix."""
        squares, size = self.squares()
        squares = squares.double().clamp_(min=0)
        largest = float(squares.max()) if squares.numel() else 0.0
        if not (size > 0 and largest > 0):
            return
        self._stable.append(max(1.0, size / largest))
        if self.complete:
            share = squares.sqrt()
            share = share[share > 0] / share.sum()
            self._effective.append(float(torch.exp(-(share * share.log()).sum())))

    def result(self) -> dict[str, Any]:
        """Return the report's fields; of experts, the mean over those that changed."""
        return {
            "stable_rank": _mean(self._stable),
            "effective_rank": _mean([each for each in self._effective if each is not None]),
            "stable_rank_estimated": self.estimated and bool(self._stable),
        }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def start_spectrum(module: AnalysedModule, edits: Sequence[LoadedEdit], buffers: DeviceBuffers) -> Spectrum:
    """Return the collector that fits a module's change and size."""
    if module.low and edits[0].factors:
        return FactorSpectrum(edits[0])
    if module.is_sketched:
        return SketchSpectrum(module.before.matrix[1], buffers)
    return HeldSpectrum(module, buffers) if module.is_held else GramSpectrum(module, buffers)


class FactorSpectrum(Spectrum):
    """Singular values of s·L·R from the r × r Gram matrices of its factors; ΔW itself is not needed."""

    def __init__(self, edit: LoadedEdit) -> None:
        super().__init__()
        assert edit.factors
        self._factors = edit.factors
        self._right = edit.factors.right(0)
        self._gram: Tensor | None = None

    def add(self, D: Tensor, start: int, stop: int) -> None:  # noqa: ARG002 - the factors tell
        """Add the rows of the left factor."""
        left = self._factors.left(start, stop)
        gram = left.T @ left
        self._gram = gram if self._gram is None else self._gram + gram

    def squares(self) -> tuple[Tensor, float]:
        """Return the eigenvalues of (LᵀL)^½·RRᵀ·(LᵀL)^½; the scaling does not change ranks."""
        assert self._gram is not None
        values, vectors = torch.linalg.eigh(self._gram)
        root = vectors * values.clamp(min=0).sqrt()
        found = torch.linalg.eigvalsh(root.T @ (self._right @ self._right.T) @ root)
        return found, float(found.clamp(min=0).sum())


class GramSpectrum(Spectrum):
    """Singular values from ΔWᵀΔW, (columns, columns)."""

    def __init__(self, module: AnalysedModule, buffers: DeviceBuffers) -> None:
        super().__init__()
        self.complete = module.is_complete
        columns, device = module.before.matrix[1], buffers.spec.device
        dtype = buffers.spec.compute if columns <= SMALL else torch.float32
        self._gram = torch.zeros(columns, columns, dtype=dtype, device=device)
        self._size = 0.0

    def add(self, D: Tensor, start: int, stop: int) -> None:  # noqa: ARG002 - rows of any place
        """Add a block's products."""
        if size := float(torch.linalg.vector_norm(D).square()):
            part = D.to(self._gram.dtype)
            self._gram.addmm_(part.T, part)
            self._size += size

    def squares(self) -> tuple[Tensor, float]:
        """Return the eigenvalues of the Gram matrix."""
        size, self._size = self._size, 0.0
        found = eigenvalues(self._gram, every=self.complete) if size else self._gram.new_zeros(0)
        self._gram.zero_()
        return found, size


class HeldSpectrum(Spectrum):
    """Singular values from ΔWΔWᵀ, (rows, rows), of a wide matrix, which is held."""

    def __init__(self, module: AnalysedModule, buffers: DeviceBuffers) -> None:
        super().__init__()
        self.complete = module.is_complete
        self._height, columns = module.rows // module.experts, module.before.matrix[1]
        dtype = buffers.spec.compute if self._height <= SMALL else torch.float32
        self._held = torch.zeros(self._height, columns, dtype=dtype, device=buffers.spec.device)
        self._size = 0.0

    def add(self, D: Tensor, start: int, stop: int) -> None:
        """Keep a block."""
        first = start % self._height
        self._held[first : first + stop - start] = D
        self._size += float(torch.linalg.vector_norm(D).square())

    def squares(self) -> tuple[Tensor, float]:
        """Return the eigenvalues of the Gram matrix."""
        size, self._size = self._size, 0.0
        if not size:
            return self._held.new_zeros(0), size
        return eigenvalues(self._held @ self._held.T, every=self.complete), size


def eigenvalues(gram: Tensor, *, every: bool) -> Tensor:
    """Return the eigenvalues of a Gram matrix, or approximations whose largest is the largest (Lanczos, 1950)."""
    if every or len(gram) <= STEPS:
        every_value: Tensor = torch.linalg.eigvalsh(gram)
        return every_value
    chance = seeded(0)
    basis = torch.zeros(STEPS + 1, len(gram), dtype=gram.dtype, device=gram.device)
    start = torch.randn(len(gram), generator=chance).to(gram)
    basis[0] = start / torch.linalg.vector_norm(start)
    for step in range(STEPS):
        following = gram @ basis[step]
        for _ in range(2):  # once more, for what rounding leaves of earlier directions
            following -= basis[: step + 1].T @ (basis[: step + 1] @ following)
        length = torch.linalg.vector_norm(following)
        if length == 0:
            break
        basis[step + 1] = following / length
    ritz: Tensor = torch.linalg.eigvalsh(basis @ (gram @ basis.T))
    return ritz


class SketchSpectrum(Spectrum):
    """σ₁ from a Nyström approximation of ΔWᵀΔW (Tropp and others, 2017), in one pass over the blocks."""

    estimated = True
    complete = False

    def __init__(self, columns: int, buffers: DeviceBuffers) -> None:
        super().__init__()
        chance = seeded(0)
        test = torch.linalg.qr(torch.randn(columns, min(SKETCH, columns), generator=chance, dtype=torch.float64)).Q
        self._test = test.to(buffers.spec.device, torch.float32)
        self._products = torch.zeros_like(self._test)
        self._size = 0.0

    def add(self, D: Tensor, start: int, stop: int) -> None:  # noqa: ARG002 - rows of any place
        """Add ΔWᵀ(ΔW·Ω) of a block."""
        if size := float(torch.linalg.vector_norm(D).square()):
            part = D.to(self._test.dtype)
            self._products.addmm_(part.T, part @ self._test)
            self._size += size

    def squares(self) -> tuple[Tensor, float]:
        """Return the largest eigenvalues of the approximation Z(ΩᵀZ)⁻¹Zᵀ with Z = ΔWᵀΔWΩ."""
        size, self._size = self._size, 0.0
        core = self._test.double().T @ self._products.double()
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = values > values.max() * 1e-6
        factor = self._products.double() @ (vectors[:, kept] / values[kept].sqrt()) if size else core.new_zeros(1, 1)
        self._products.zero_()
        return torch.linalg.svdvals(factor).square(), size
