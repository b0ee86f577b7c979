"""Compute V − W of updates that are not low rank, for some rows of the stored matrix, in float64 by definition.

Merges are checked against this file, so it shares no code with the engine's arithmetic: products are written
out, and Fourier transforms are products with matrices of cosines and sines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import LowRank, Transform
from ..adapters.kinds import Computed, Dense, Factor, Hadamard, Kronecker, Modulated, Sparse, Tucker
from ..adapters.rotations import Rotated
from ..deferred_imports import seeded
from ..plan.item import Edit
from ..storage.safetensors import StoredTensor
from .rotations import stages_of, turned_rows

Load = Callable[[StoredTensor], Tensor]
"""Reads a whole stored tensor in float64, as a matrix."""


class RowChange(NamedTuple):
    """V − W of some rows, the size of the numbers that it is computed from, and the number of terms in a sum."""

    delta: Tensor
    size: Tensor
    terms: int


class ExpectedTransform:
    """V − W of one update, for any rows of the stored matrix."""

    def __init__(self, edit: Edit, load: Load) -> None:
        assert edit.inner
        self._edit, self._load, self._transposed = edit, load, edit.transposed
        self._transform = transform = edit.inner
        self._whole: Tensor | None = None
        if isinstance(transform, Rotated):
            self._stages = stages_of(transform, load)
        elif isinstance(transform, Computed | Tucker | Dense):
            self._whole = _matrix(transform, load)

    @property
    def depends(self) -> bool:
        """True if V − W depends on W."""
        return self._transform.depends

    @property
    def mixes_rows(self) -> bool:
        """True if rows of V depend on other rows of W."""
        return isinstance(self._transform, Rotated) and self._transform.on_outputs != self._transposed

    def change(
        self, W: Tensor, rows: Sequence[int], whole: Callable[[], Tensor]
    ) -> tuple[Tensor, Callable[[], Tensor], int]:
        """Return V − W of some rows W of the stored matrix, the size of its numbers, and the terms of each sum.

        `whole` returns all rows.
        """
        delta, sizes = torch.zeros_like(W), torch.zeros_like(W)
        lines, columns = self._own(rows)
        if not lines:
            return delta, lambda: sizes, 1
        numbers = [rows[k] - self._first for k in lines]
        part = self._changed(W[lines][:, columns], numbers, lambda: self._own_of(whole()))
        delta[lines, columns], sizes[lines, columns] = part.delta, part.size
        return delta, lambda: sizes, part.terms

    def back(self, V: Tensor, rows: Sequence[int], whole: Callable[[], Tensor]) -> Tensor:
        """Return W of some rows V; `whole` returns all rows of V."""
        W = V.clone()
        lines, columns = self._own(rows)
        if not lines:
            return W
        numbers = [rows[k] - self._first for k in lines]
        W[lines, columns] = self._taken_back(V[lines][:, columns], numbers, lambda: self._own_of(whole()))
        return W

    @property
    def _first(self) -> int:
        """The first row of the stored matrix that the edit changes."""
        return self._edit.outputs[0] if self._edit.outputs and not self._edit.by_columns else 0

    def _own(self, rows: Sequence[int]) -> tuple[list[int], slice]:
        """Return the rows, by their places among `rows`, and the columns that the edit changes."""
        outputs = self._edit.outputs
        if not outputs or self._edit.by_columns:
            return list(range(len(rows))), slice(*outputs) if outputs else slice(None)
        return [k for k, row in enumerate(rows) if outputs[0] <= row < outputs[1]], slice(None)

    def _own_of(self, whole: Tensor) -> Tensor:
        lines, columns = self._own(range(len(whole)))
        return whole[lines][:, columns]

    def _changed(self, W: Tensor, rows: Sequence[int], whole: Callable[[], Tensor]) -> RowChange:
        """Return V − W of some of the edit's own rows."""
        transform = self._transform
        if isinstance(transform, Rotated):
            if self.mixes_rows:
                turned = turned_rows(whole().T, self._stages).T[list(rows)]
            else:
                turned = turned_rows(W, self._stages)
            size = torch.linalg.vector_norm(W, dim=1, keepdim=True).expand_as(W)
            return RowChange(turned - W, size + W.abs().amax() if W.numel() else size, 4 * transform.size)
        delta, size, terms = self._added(rows, W.shape[1])
        if isinstance(transform, Modulated):
            return RowChange(W * delta, W.abs() * (1 + size), terms)
        return RowChange(transform.scale * delta, abs(transform.scale) * size, terms)

    def _taken_back(self, V: Tensor, rows: Sequence[int], whole: Callable[[], Tensor]) -> Tensor:
        """Return W of some of the edit's own rows V."""
        if isinstance(self._transform, Rotated):
            if self.mixes_rows:
                return turned_rows(whole().T, self._stages, back=True).T[list(rows)]
            return turned_rows(V, self._stages, back=True)
        assert isinstance(self._transform, Modulated)
        return V / (1 + self._added(rows, V.shape[1])[0])

    def _added(self, rows: Sequence[int], width: int) -> tuple[Tensor, Tensor, int]:
        """Return rows of the stored Δ, the sizes of its sums, and the terms of each."""
        match self._transform:
            case Hadamard(one, other):
                (a, sa, ta), (b, sb, tb) = (self._product(each, rows) for each in (one, other))
                return a * b, sa * sb, ta + tb
            case Modulated(by):
                return self._product(by, rows)
            case Kronecker(one, other):
                left, right = (_turn(_matrix(each, self._load), turned=self._transposed) for each in (one, other))
                height = len(right)
                delta = torch.stack([torch.outer(left[row // height], right[row % height]).flatten() for row in rows])
                return delta, delta.abs() + 1e-30, 2 * max(map(_rank, (one, other)))
            case Sparse(values, index):
                return self._scattered(self._load(values).flatten(), self._load(index), rows, width)
        assert self._whole is not None
        delta = _turn(self._whole, turned=self._transposed)[list(rows)]
        spread = delta.abs().max() if isinstance(self._transform, Computed | Tucker) else delta.abs()
        return delta, spread.expand_as(delta), 64

    def _product(self, part: LowRank | Tucker, rows: Sequence[int]) -> tuple[Tensor, Tensor, int]:
        if isinstance(part, Tucker):
            delta = _turn(_matrix(part, self._load), turned=self._transposed)[list(rows)]
            return delta, delta.abs().max().expand_as(delta), 4 * part.rank
        B, A = self._load(part.B), self._load(part.A)
        left, right = (A.T[list(rows)], B.T) if self._transposed else (B[list(rows)], A)
        delta = part.scale * torch.einsum("kr,rc->kc", left, right)
        return delta, abs(part.scale) * (left.abs() @ right.abs()), part.rank

    def _scattered(self, values: Tensor, index: Tensor, rows: Sequence[int], width: int) -> tuple[Tensor, Tensor, int]:
        down, across = index.long().flip(0) if self._transposed else index.long()
        delta = values.new_zeros(len(rows), width)
        for k, row in enumerate(rows):
            mine = down == row
            delta[k].index_add_(0, across[mine], values[mine])
        return delta, delta.abs(), 1


def _turn(matrix: Tensor, *, turned: bool) -> Tensor:
    return matrix.T if turned else matrix


def _rank(factor: Factor) -> int:
    return 1 if isinstance(factor, StoredTensor) else factor.rank


def _matrix(part: Factor | Transform, load: Load) -> Tensor:
    """Return a whole matrix, (out, in), without its scaling unless it is a factor's."""
    match part:
        case StoredTensor():
            return load(part)
        case LowRank(A, B):
            return part.scale * torch.einsum("or,ri->oi", load(B), load(A))
        case Tucker(core, A, B):
            t = load(core).view(*core.shape[:2], -1)
            return torch.einsum("mnt,om,ni->oit", t, load(B), load(A)).flatten(1)
        case Dense(value):
            return load(value)
    assert isinstance(part, Computed)
    return RULES[part.rule](part, {role: load(stored).view(stored.shape) for role, stored in part.parts})


Parts = dict[str, Tensor]


def _shape(part: Computed) -> tuple[int, int]:
    outputs, inputs = part.shape
    assert outputs
    assert inputs
    return outputs, inputs


def _miss(part: Computed, parts: Parts) -> Tensor:
    outputs, inputs = _shape(part)
    block = parts["block"]
    wide = block.repeat(math.ceil(inputs / len(block)), outputs // block.shape[1])
    return wide[:inputs].T


def _delora(_: Computed, parts: Parts) -> Tensor:
    A, B = parts["A"], parts["B"]
    total = A.new_zeros(B.shape[0], A.shape[1])
    for a, b in zip(A, B.T, strict=True):
        lengths = max(float(a.norm()), 1e-4) * max(float(b.norm()), 1e-4)
        total += torch.outer(b, a) * (parts["strength"].flatten() / len(A) / lengths)
    return total * parts["norms"].flatten()


def _fourier(part: Computed, parts: Parts) -> Tensor:
    outputs, inputs = _shape(part)
    spectrum = parts["spectrum"].flatten().cpu()
    generator = seeded(int(dict(part.numbers)["seed"]))
    places = torch.randperm(outputs * inputs, generator=generator)[: len(spectrum)]
    dense = torch.zeros(outputs, inputs, dtype=torch.float64)
    dense[places // inputs, places % inputs] = spectrum
    down, across = (torch.arange(side, dtype=torch.float64) for side in (outputs, inputs))
    rows, columns = (2 * math.pi * torch.outer(x, x) / len(x) for x in (down, across))
    real = rows.cos() @ dense @ columns.cos() - rows.sin() @ dense @ columns.sin()
    return (real / (outputs * inputs)).to(parts["spectrum"])


def _c3a(_: Computed, parts: Parts) -> Tensor:
    kernel = parts["kernel"]
    m, n, b = kernel.shape
    whole = kernel.new_empty(m * b, n * b)
    for p in range(b):
        whole[p::b] = kernel.roll(p, dims=2).reshape(m, n * b)
    return whole / (n * b)


def _randlora(part: Computed, parts: Parts) -> Tensor:
    low, high = sorted(_shape(part))
    A, B, (rank, count) = parts["A"][:, 0, :low], parts["B"][:high], parts["weights"].shape
    total = A.new_zeros(high, low)
    for term in range(rank * count):  # PEFT counts a base's rank first on one side, and last on the other
        (of_B, i), (j, of_A) = divmod(term, rank), divmod(term, count)
        right = parts["weights"][j, of_A] * A[j] * parts["scales"][of_A]
        total += torch.outer(B[:, of_B, i], right)
    return total if low == _shape(part)[1] else total.T


def _vera(part: Computed, parts: Parts) -> Tensor:
    outputs, inputs = _shape(part)
    numbers = {name: int(value) for name, value in part.numbers}
    generator = seeded(numbers["seed"])
    A, B = torch.empty(numbers["rank"], numbers["inputs"]), torch.empty(numbers["outputs"], numbers["rank"])
    for matrix in (A, B):
        torch.nn.init.kaiming_uniform_(matrix, nonlinearity="relu", generator=generator)
    d, b = parts["d"].flatten(), parts["b"].flatten()
    return torch.einsum("o,or,r,ri->oi", b, B[:outputs].to(b), d, A[:, :inputs].to(d))


def _vera_of_matrices(_: Computed, parts: Parts) -> Tensor:
    return torch.einsum("op,pr,rs,si->oi", parts["E"], parts["B"], parts["D"], parts["A"])


RULES: dict[str, Callable[[Computed, Parts], Tensor]] = {
    "MiSS": _miss, "DeLoRA": _delora, "FourierFT": _fourier, "C3A": _c3a, "RandLoRA": _randlora, "VeRA": _vera,
    "VeRA with matrices": _vera_of_matrices,
}  # fmt: skip
