"""Compute the rotations of OFT, BOFT and HRA: how each turns rows, and how to turn them back (49–51).

A rotation is orthogonal, or nearly so: its R is applied to row vectors, x ↦ xR. Blocks are (n, b, b).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """One block-diagonal factor of a rotation, between a permutation of the elements and its inverse."""

    blocks: Tensor  # (n, b, b): each part of a row is multiplied by its block from the right; (1, b, b) serves all
    order: Tensor | None = None  # (n·b,)

    def turn(self, x: Tensor) -> Tensor:
        """Turn the rows of a matrix, (rows, n·b)."""
        return self._multiplied(x, self.blocks)

    def turn_back(self, x: Tensor) -> Tensor:
        """Turn the rows of a matrix back."""
        return self._multiplied(x, torch.linalg.inv(self.blocks))

    def _multiplied(self, x: Tensor, blocks: Tensor) -> Tensor:
        parts = (x if self.order is None else x[:, self.order]).reshape(len(x), -1, blocks.shape[-1])
        turned = torch.einsum("xnb,nbc->xnc", parts, blocks).reshape(x.shape)
        if self.order is None:
            return turned
        return torch.empty_like(turned).index_copy_(1, self.order, turned)


@dataclass(frozen=True)
class Reflections:
    """Householder reflections one after the other: x ↦ x − 2(xu)uᵀ for each unit vector u."""

    vectors: Tensor  # (r, width), each of length 1

    def turn(self, x: Tensor) -> Tensor:
        """Reflect the rows of a matrix, (rows, width)."""
        return self._reflected(x, self.vectors)

    def turn_back(self, x: Tensor) -> Tensor:
        """Reflect the rows of a matrix in the other order."""
        return self._reflected(x, self.vectors.flip(0))

    def _reflected(self, x: Tensor, vectors: Tensor) -> Tensor:
        for u in vectors:
            x = x - torch.outer(x @ u, 2 * u)
        return x


Rotation = Sequence[Stage | Reflections]


def turn(x: Tensor, rotation: Rotation) -> Tensor:
    """Return xR for rows x."""
    for stage in rotation:
        x = stage.turn(x)
    return x


def turn_back(x: Tensor, rotation: Rotation) -> Tensor:
    """Return xR⁻¹ for rows x."""
    for stage in reversed(rotation):
        x = stage.turn_back(x)
    return x


def oft(upper: Tensor, size: int, terms: int, limit: float, *, embedding: bool = False) -> Rotation:
    """Return PEFT's OFT: W' = WRᵀ with R by the Cayley transform of skew blocks; `limit` is COFT's eps (49).

    `upper` is (n, b(b−1)/2). An embedding's rows are turned by R itself.
    """
    Q = skew(upper, size)
    if limit:
        lengths, most = torch.linalg.matrix_norm(Q, keepdim=True), limit / len(Q) ** 0.5
        Q = torch.where(lengths <= most, Q, Q * (most / lengths))
    R = cayley_series(Q, terms) if terms else cayley(-Q)
    return [Stage(R if embedding else R.mT)]


def boft(blocks: Tensor) -> Rotation:  # (stages, n, b, b)
    """Return PEFT's BOFT: butterfly stages of exact Cayley transforms of the blocks' skew parts (50)."""
    stages, count, size, _ = blocks.shape
    R = cayley((blocks.mT - blocks) / 2)
    orders = [_order_of_peft(count * size, size, k).to(R.device) if stages > 1 else None for k in range(stages)]
    return [Stage(R[k].mT, orders[k]) for k in range(stages)]


def diag_oft(blocks: Tensor, limit: float) -> Rotation:  # (n, b, b)
    """Return LyCORIS' diag-OFT, for the columns of W as rows: W' = RᵀW; `limit` bounds all blocks together (49)."""
    return [Stage(cayley(_limited(blocks - blocks.mT, limit)))]


def butterfly(blocks: Tensor, limit: float) -> Rotation:  # (stages, n, b, b)
    """Return LyCORIS' BOFT, for the columns of W as rows: stage k mixes elements that are 2ᵏ·b/2 apart (50)."""
    stages, count, size, _ = blocks.shape
    R = cayley(_limited(blocks - blocks.mT, limit))
    elements = torch.arange(count * size, device=blocks.device)
    orders = [elements.view(-1, 2, 2**k * (size // 2)).mT.flatten() for k in range(stages)]
    return [Stage(R[k].mT, orders[k]) for k in range(stages)]


def hra(u: Tensor, *, orthogonal: bool) -> Rotation:  # (width, r)
    """Return HRA's reflections: by each column of u, made orthogonal to those before it if asked (51)."""
    vectors: list[Tensor] = []
    for column in u.T:
        rest = column
        for before in vectors if orthogonal else ():
            rest = rest - (before @ rest) * before
        vectors.append(rest / torch.linalg.vector_norm(rest))
    return [Reflections(torch.stack(vectors))]


def skew(upper: Tensor, size: int) -> Tensor:  # (n, b(b−1)/2) → (n, b, b)
    """Return skew-symmetric blocks from the elements above their diagonals, row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    blocks = upper.new_zeros(len(upper), size, size)
    blocks[:, rows, columns] = upper
    return blocks - blocks.mT


def cayley(Q: Tensor) -> Tensor:  # (…, b, b), skew-symmetric
    """Return the rotation (I + Q)(I − Q)⁻¹."""
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    R: Tensor = torch.linalg.solve(one - Q, one + Q, left=False)
    return R


def cayley_series(Q: Tensor, terms: int) -> Tensor:  # (n, b, b), skew-symmetric
    """Return PEFT's series of (I + Q)(I − Q)⁻¹: I + 2Q + … + 2Qᵖ⁻¹ + Qᵖ, p = terms − 1 and at least 3.

    One term is I, two are I + 2Q.
    """
    R = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q).clone()
    last = terms - 1 if terms < 3 else max(3, terms - 1)
    power = Q
    for exponent in range(1, last + 1):
        R += power if exponent == last and terms > 2 else 2 * power
        power = power @ Q
    return R


def _limited(Q: Tensor, limit: float) -> Tensor:
    length = torch.linalg.vector_norm(Q) + 1e-8
    return Q * (limit / length) if limit and length > limit else Q


def _order_of_peft(width: int, size: int, stage: int) -> Tensor:
    """Return the order in which PEFT's BOFT takes elements into the blocks of a stage.

    Within groups of 2ˢ blocks, half-blocks with even numbers come first, those with odd numbers behind them.
    """
    group, half = 2**stage * size, size // 2
    parts = torch.arange(group).view(-1, half)
    taken = torch.cat([parts[0::2], parts[1::2]]).flatten()
    groups = torch.arange(0, width, group)[:, None]
    return torch.argsort((groups + taken).flatten())
