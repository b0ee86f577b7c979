"""Look at low-rank changes of a block, a tile at a time: norms, a sample, and the elements near a threshold.

TorchScript compiles what other files call, so that threads do not wait for each other (scripted.py). A tile, as large
as the scratch space, stays in a processor's own cache.

A change is g·W + left·right in float32, and f·(W + scale·left·right) − W in float64. An empty g is zero, an empty f is
one. Both are (rows, 1) or (1, columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..scripted import Scripted


def change_rows(W: Tensor, g: Tensor, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Compute the change of some rows."""
    if g.numel() == 0:
        return torch.mm(left, right, out=out)
    return torch.mul(W, g, out=out).addmm_(left, right)


def some_rows(x: Tensor, first: int, last: int) -> Tensor:
    """Return some rows, or the only one for all."""
    return x[first:last] if len(x) > 1 else x  # of nothing, nothing


def some_columns(x: Tensor, start: int, stop: int) -> Tensor:
    """Return some columns, or the only one for all; nothing of nothing."""
    return x[:, start:stop] if x.numel() > len(x) else x


def places_of(
    marks: Tensor,  # bool
    groups: Tensor,  # the same memory as int64; `marks` again if eight are not a divisor
) -> Tensor:
    """Return the flat places of the few marks that are True; eight are looked at together."""
    if groups.dtype == marks.dtype:
        return marks.view(-1).nonzero().squeeze(1)
    hits = groups.nonzero().squeeze(1)
    inside = marks.view(-1, 8).index_select(0, hits).view(-1).nonzero().squeeze(1)
    return hits.mul_(8).index_select(0, inside.bitwise_right_shift(3)).add_(inside.bitwise_and_(7))


@Scripted
def count_block(
    W: Tensor,  # (rows, columns), float64 or narrower
    change: list[Tensor],  # g, left and right
    bounds: list[float],  # low and high
    scratch: Tensor,  # (2, some rows, some columns), float32
    chosen: Tensor,  # (rows, columns), float32, overwritten
    marks: Tensor,  # (rows, columns), bool, overwritten
    groups: Tensor,  # the same memory, as `places_of` takes it
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Find the magnitudes of a change between two bounds.

    Return them with their places and values of W, and count those that reach the upper bound.
    """
    above = 0
    for start in range(0, W.size(1), scratch.size(2)):
        stop = min(start + scratch.size(2), W.size(1))
        g, right, parts = some_columns(change[0], start, stop), change[2][:, start:stop], scratch[:, :, : stop - start]
        for first in range(0, len(W), scratch.size(1)):
            last = min(first + scratch.size(1), len(W))
            single, sizes = parts[0, : last - first].copy_(W[first:last, start:stop]), parts[1, : last - first]
            change_rows(single, some_rows(g, first, last), change[1][first:last], right, sizes).abs_()
            inside = chosen[first:last, start:stop]
            torch.ops.aten.hardtanh_backward(sizes, sizes, bounds[0], bounds[1], grad_input=inside)
            marks[first:last, start:stop].copy_(inside)
            above += int(sizes.ge_(bounds[1]).sum())  # float32 adds up so many ones exactly
    places = places_of(marks, groups)
    return chosen.view(-1).index_select(0, places), places, W.view(-1).index_select(0, places), above


@Scripted
def norms_of_block(
    W: Tensor,  # (rows, columns)
    rights: Tensor,  # (all ranks, columns), float64: the right factors of all edits
    grams: list[Tensor],  # right·rightᵀ of each
    lefts: list[Tensor],  # (rows, rank), float64
    ratios: list[float],  # the factors of left·right
    scratch: Tensor,  # (some rows, some columns), float64
    cancelled: float,
) -> tuple[list[Tensor], list[bool]]:
    """Return the norms of V = W + s·BA for each edit: ‖V‖² = ‖W‖² + 2s·⟨WAᵀ, B⟩ + s²·‖BA‖².

    The flags tell where all squares are more than a part of ‖W‖²: smaller ones have lost digits.
    """
    squares = torch.zeros(len(W), dtype=torch.float64)
    mixed = torch.zeros(len(W), len(rights), dtype=torch.float64)
    for start in range(0, W.size(1), scratch.size(1)):
        stop = min(start + scratch.size(1), W.size(1))
        turned = rights[:, start:stop].t()
        for first in range(0, len(W), len(scratch)):
            last = min(first + len(scratch), len(W))
            tile = scratch[: last - first, : stop - start].copy_(W[first:last, start:stop])
            squares[first:last].add_(torch.linalg.vector_norm(tile, 2, [1]).square_())
            mixed[first:last].addmm_(tile, turned)
    place = 0
    found: list[Tensor] = []
    sure: list[bool] = []
    for k in range(len(lefts)):
        left, gram = lefts[k] * ratios[k], grams[k]
        own = mixed[:, place : place + len(gram)]
        place += len(gram)
        total = squares + (left * own).sum(1).mul_(2) + (left @ gram).mul_(left).sum(1)
        sure.append(bool((total > cancelled * squares).all()))
        found.append(total.sqrt_())
    return found, sure


def change_of(W: Tensor, f: Tensor, product: Tensor) -> Tensor:
    """Return a change in float64, in place of s·left·right."""
    return product.add_(W).mul_(f).sub_(W) if f.numel() > 0 else product


@Scripted
def sample_of_block(
    W: Tensor,  # (rows, columns)
    changes: list[list[Tensor]],  # f, left and right of each, float64
    scales: list[float],
    first: int,
    step: int,
) -> list[Tensor]:
    """Return the magnitudes of each change in some columns, in float32."""
    found: list[Tensor] = []
    few = W[:, first::step].to(torch.float64)
    for k, change in enumerate(changes):
        f = change[0] if change[0].numel() <= len(W) else change[0][:, first::step]
        product = torch.mm(change[1], change[2][:, first::step]).mul_(scales[k])
        found.append(change_of(few, f, product).abs_().to(torch.float32).flatten())
    return found


def elements_of(W: Tensor, change: list[Tensor], scale: float, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the change of single elements in float64; the right factor comes turned: (columns, rank)."""
    left, right = change[1].index_select(0, rows), change[2].index_select(0, columns)
    product = left.mul_(right).sum(1).mul_(scale)
    f = change[0].view(-1)
    if f.numel() > 0:
        f = f.index_select(0, rows if change[0].size(1) == 1 else columns)
    return change_of(W, f, product)
