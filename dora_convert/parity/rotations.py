"""Turn rows by the rotations of OFT, BOFT and HRA, in float64 by definition: block by block, and with inverses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..adapters.rotations import Rotated
from ..storage.safetensors import StoredTensor

Load = Callable[[StoredTensor], Tensor]
Stage = tuple[Tensor, Tensor | None]
"""Blocks (n, b, b) and the order of the elements in them; or one vector, along which a reflection turns."""


def turned_rows(x: Tensor, stages: Sequence[Stage], *, back: bool = False) -> Tensor:
    """Turn rows by each stage, block by block; `back` turns them back."""
    for blocks, order in reversed(stages) if back else stages:
        if blocks.dim() == 1:
            x = x - 2 * torch.einsum("xc,c,d->xd", x, blocks, blocks)
            continue
        y = x if order is None else x[:, order]
        size, z = blocks.shape[-1], torch.empty_like(y)
        for k in range(y.shape[1] // size):
            block, mine = blocks[k % len(blocks)], slice(k * size, (k + 1) * size)
            z[:, mine] = torch.linalg.solve(block.T, y[:, mine].T).T if back else y[:, mine] @ block
        x = z
        if order is not None:
            x = torch.empty_like(z)
            x[:, order] = z
    return x


def stages_of(rotated: Rotated, load: Load) -> list[Stage]:
    """Return the blocks that turn rows from the right, stage by stage, each with the order of the elements."""
    stored = load(rotated.blocks).view(rotated.blocks.shape)
    match rotated.rule:
        case "hra":
            return [(u, None) for u in _unit_vectors(stored, orthogonal=bool(rotated.terms))]
        case "oft":
            blocks = torch.stack([_oft_block(upper, rotated, len(stored)) for upper in stored])
            return [(blocks.mT if rotated.embedding else blocks, None)]
        case "boft":
            orders = [_peft_order(stored.shape, k) for k in range(len(stored))]
            pairs = zip(stored, orders, strict=True)
            return [(torch.stack([_fraction((x.T - x) / 2).T for x in stage]), order) for stage, order in pairs]
    skew = stored - stored.mT
    length = skew.square().sum().sqrt() + 1e-8
    skew = skew * min(1.0, rotated.limit / float(length)) if rotated.limit else skew
    if rotated.rule == "diag-oft":
        return [(torch.stack([_fraction(Q) for Q in skew]), None)]
    orders = [_butterfly_order(stored.shape, k) for k in range(len(skew))]
    return [(torch.stack([_fraction(Q).T for Q in stage]), order) for stage, order in zip(skew, orders, strict=True)]


def _fraction(Q: Tensor) -> Tensor:
    """Return (I + Q)(I − Q)⁻¹."""
    one = torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
    inverse: Tensor = torch.linalg.inv(one - Q)
    return (one + Q) @ inverse


def _oft_block(upper: Tensor, rotated: Rotated, count: int) -> Tensor:
    """Return one of PEFT's OFT blocks, which turns rows from the right."""
    size = rotated.size
    Q = upper.new_zeros(size, size)
    Q[torch.ones_like(Q, dtype=torch.bool).triu(1)] = upper
    Q = Q - Q.T
    if rotated.limit and (length := float(Q.square().sum().sqrt())) > (most := rotated.limit / math.sqrt(count)):
        Q = Q * (most / length)
    if not rotated.terms:
        return _fraction(-Q).T
    powers = [torch.linalg.matrix_power(Q, k) for k in range(max(4, rotated.terms))]
    factors = {1: [1.0], 2: [1.0, 2.0]}.get(rotated.terms, [1.0, *[2.0] * (len(powers) - 2), 1.0])
    return torch.stack([factor * power for factor, power in zip(factors, powers, strict=False)]).sum(0).T


def _unit_vectors(u: Tensor, *, orthogonal: bool) -> list[Tensor]:
    if orthogonal:
        u = torch.linalg.qr(u).Q  # its columns are those of Gram and Schmidt, up to signs, which reflections ignore
    return [column / column.norm() for column in u.T]


def _peft_order(shape: Sequence[int], stage: int) -> Tensor | None:
    """Return the order of elements in a stage of PEFT's BOFT: the inverse of its permutation."""
    stages, count, size, _ = shape
    if stages == 1:
        return None
    group, half = 2**stage * size, size // 2
    order = torch.empty(count * size, dtype=torch.long)
    for place in range(count * size):
        start, inside = place - place % group, place % group
        part, rest = divmod(inside, half)
        parts = group // half
        source = 2 * part if part < parts // 2 else 2 * (part - parts // 2) + 1
        order[start + source * half + rest] = place
    return order


def _butterfly_order(shape: Sequence[int], stage: int) -> Tensor:
    """Return the order of elements in a stage of LyCORIS' BOFT: two that are 2ᵏ·b/2 apart become neighbours."""
    _, count, size, _ = shape
    half = 2**stage * (size // 2)
    places = []
    for start in range(0, count * size, 2 * half):
        for inside in range(half):
            places += [start + inside, start + inside + half]
    return torch.tensor(places)
