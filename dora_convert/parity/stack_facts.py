"""Compute the facts on compared rows of plain LoRAs and DoRAs, for a stack of weights, in few calls."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.precision import EXPONENT, GRID, TORCH
from ..scripted import Scripted


class Memory(threading.local):
    """Memory that a thread uses again for each stack: fresh pages cost more than arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor with any values, which the next call of this name overwrites."""
        if device.type != "cpu":
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        nbytes = math.prod(shape) * dtype.itemsize
        if name not in self._buffers or self._buffers[name].numel() < nbytes:
            self._buffers[name] = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffers[name][:nbytes].view(dtype).view(tuple(shape))


MEMORY = Memory()
NAMES = {kind: name for name, kind in TORCH.items()}


@Scripted
def stack_facts(
    base: Tensor,  # the compared rows of all weights, or all rows, as stored: (…, columns)
    written: Tensor,  # as base, in the stored dtype
    bits: Tensor,  # `written` as integers
    A: Tensor,  # (weights, r, columns), as stored
    B: Tensor,  # as base: (…, r)
    m: Tensor | None,  # of all rows of all weights
    scales: Tensor,  # (weights, 1, 1), float64
    offsets: Tensor,  # (weights, 1), float64: added to m
    numbers: Tensor,  # (weights, rows), of the compared rows among those of all weights
    scratch: list[Tensor],  # in float64: x, its bits, W and A of some weights and rows; rows of B of all weights
    units: list[float],  # 2ᵖ, and the least normal number, of the stored dtype
    *,
    quick: bool,
) -> Tensor:
    """Return three facts on each weight: ‖x − W‖², ‖got − x‖², and the room for its worst element, (3, weights).

    x is W + s·BA, or m times it over its norm. The room is the least ½ulp(x) − |got − x|, in any unit: its sign alone
    counts, and is exact. If it is positive, every element is the value nearest to x, ties to even. NaN is not positive.
    """
    x_, powers, W_, A_, B_ = scratch
    count, rows, together, height = A.size(0), numbers.size(1), x_.size(0), x_.size(1)
    left = B_[:count, :rows].copy_(_chosen(B, numbers, [0, count, 0, rows])).mul_(scales.to(B_))
    sizes = offsets if m is None else _sizes(m, numbers, offsets).to(x_.device)
    facts: list[Tensor] = []
    for first in range(0, count, together):
        last = min(count, first + together)
        right = A_[: last - first].copy_(A[first:last])
        found: list[Tensor] = []
        for top in range(0, rows, height):
            bottom = min(rows, top + height)
            part = [first, last, top, bottom]
            x, W = x_[: last - first, : bottom - top], W_[: last - first, : bottom - top]
            x.copy_(_chosen(base, numbers, part)).baddbmm_(left[first:last, top:bottom], right)
            if m is not None:
                squares = torch.mul(x, x, out=W).sum([2])
                x.mul_((sizes[first:last, top:bottom] / squares.sqrt_()).unsqueeze(2))
            change = torch.linalg.vector_norm(W.copy_(_chosen(base, numbers, part)).sub_(x), 2.0, [1, 2])
            off = W.copy_(_chosen(written, numbers, part)).sub_(x)
            rounding = torch.linalg.vector_norm(off, 2.0, [1, 2])
            room = _room(x, powers[: last - first, : bottom - top], off.abs_(), units, out=off, quick=quick)
            least = room.amin([1, 2])
            if bool((least == 0).any()):
                least = _least_with_ties(room, _chosen(bits, numbers, part))
            found.append(torch.stack([change, rounding, least]))
        facts.append(found[0] if len(found) == 1 else _of_all(torch.stack(found)))
    return _squared(torch.cat(facts, dim=1))


def _sizes(m: Tensor, numbers: Tensor, offsets: Tensor) -> Tensor:
    """Return the magnitudes of the compared rows, (weights, rows)."""
    every = [0, numbers.size(0), 0, numbers.size(1)]
    return _chosen(m.unsqueeze(1), numbers, every).squeeze(2).to(torch.float64) + offsets


def _squared(facts: Tensor) -> Tensor:
    """Square the two norms among three facts."""
    facts[:2].square_()
    return facts


def _of_all(found: Tensor) -> Tensor:
    """Return norms of changes and roundings, and the least room, from those of several parts: (parts, 3, weights)."""
    norms = torch.linalg.vector_norm(found[:, :2], 2.0, [0])
    return torch.cat([norms, found[:, 2:].amin([0])])


def _chosen(matrix: Tensor, numbers: Tensor, part: list[int]) -> Tensor:
    """Return the rows of some weights, as (weights, rows, columns), from all of their rows or the compared ones."""
    first, last, top, bottom = part
    if matrix.size(0) == numbers.numel():
        return matrix.view(numbers.size(0), numbers.size(1), -1)[first:last, top:bottom]
    return matrix.index_select(0, numbers[first:last, top:bottom].flatten()).view(last - first, bottom - top, -1)


def _room(
    x: Tensor,
    powers: Tensor,  # the bits of x
    off: Tensor,
    units: list[float],
    out: Tensor,  # may be `off`
    exponent: int = EXPONENT,
    *,
    quick: bool,
) -> Tensor:
    """Return ½ulp(x) − |got − x| in `out`, where `off` is |got − x|, in any unit.

    Half a unit in the last place is a power of two: 2⁻ᵖ of the one that is not above |x|, which takes x's place.
    Subnormal numbers have larger units than that, which a `quick` answer leaves out.
    """
    powers.bitwise_and_(exponent)
    if quick:
        return torch.sub(x, off, alpha=units[0], out=out)
    return torch.sub(x.clamp_(units[1], 2.0**1023).mul_(1.0 / units[0]), off, out=out)


def _least_with_ties(room: Tensor, bits: Tensor) -> Tensor:
    """Return the least room in each matrix of a stack; a tie has room if its number, as an integer, is even."""
    i, j, k = (room == 0).nonzero().unbind(1)
    number = bits[i.to(bits.device), j.to(bits.device), k.to(bits.device)]
    room[i, j, k] = (number.bitwise_and(1) == 0).to(room.device, room.dtype)
    return room.amin([1, 2])


def least_room(off: Tensor, x: Tensor, written: Tensor, *, out: Tensor, quick: bool) -> Tensor:
    """Return the room of `stack_facts` in each matrix of a stack, from |got − x|; overwrites x and `out`.

    `written` are the numbers as they are stored; `out` may be the memory of `off`.
    """
    precision, least = GRID[NAMES[written.dtype]]
    room = _room(x, x.view(torch.int64), off, [2.0**precision, 2.0**least], out, quick=quick)
    smallest = room.amin([1, 2])
    return _least_with_ties(room, integers(written)) if (smallest == 0).any() else smallest


def integers(numbers: Tensor) -> Tensor:
    """Return numbers in the integers that their bits are."""
    return numbers.view(torch.int16 if numbers.element_size() == 2 else torch.int32)
