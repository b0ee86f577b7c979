"""Combine several changes of one weight: prune, drop at random, elect signs, add (docs/mathematics.md, 21 to 24).

All functions take blocks of rows. Random numbers depend on a key, a row and a column alone, so that no block, device
or worker changes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SPREAD = 0.15
"""The largest distance of DELLA's probabilities from the density."""
GOLDEN = 0x9E3779B97F4A7C15


def kept_count(density: float, numel: int) -> int:
    """Return the number of elements that pruning keeps, cut down to a whole number as PEFT does."""
    return min(numel, int(density * numel))


def prune_(delta: Tensor, least: float) -> Tensor:
    """Set elements whose magnitude is below `least` to zero (21)."""
    if least <= 0:
        return delta
    pruned: Tensor = torch.ops.aten.hardshrink(delta, math.nextafter(least, 0.0), out=delta)
    return pruned


def drop_equal_(
    delta: Tensor,  # changed in place, contiguous
    least: float,
    first: int,
) -> Tensor:
    """Set elements of magnitude `least` to zero from the flat position `first` on."""
    flat = delta.view(-1)[max(0, first) :]
    flat[flat.abs() == least] = 0.0
    return delta


def random_words(key: int, start: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return 32 random bits for each element of a block that begins with row `start`, as int32.

    Each row has a 64-bit key: splitmix64's finaliser of the key and the row's number. A column's bits are two rounds
    of a 32-bit mixer, one for each half of the row's key.
    """
    rows, columns = shape
    keys = _row_keys(key, start, rows)
    low, high = ((half & 0xFFFFFFFF).to(torch.uint32).view(torch.int32) for half in (keys, keys >> 32))
    words = torch.arange(columns, dtype=torch.int32, device=device)[None, :] ^ low.to(device)[:, None]
    return _scrambled_(_scrambled_(words).bitwise_xor_(high.to(device)[:, None]))


def _row_keys(key: int, start: int, rows: int) -> Tensor:
    """Return splitmix64's finaliser of the key and each row's number, as int64."""
    z = torch.arange(start + 1, start + rows + 1, dtype=torch.int64).mul_(_signed(GOLDEN)).add_(_signed(key))
    z = (z ^ _shifted(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    z = (z ^ _shifted(z, 27)).mul_(_signed(0x94D049BB133111EB))
    return z ^ _shifted(z, 31)


def _signed(number: int) -> int:
    """Return the signed 64-bit integer with the same bits as a number's low 64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right, filling with zeros."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _scrambled_(x: Tensor) -> Tensor:
    """Mix 32-bit integers in place: shifts and products that reach every bit of the result."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - (1 << 32))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def drop_(
    delta: Tensor,  # changed in place
    words: Tensor,  # random, as `delta`
    density: float,
) -> Tensor:
    """Keep each element with probability `density`, and divide it by `density` (22, DARE)."""
    if density >= 1:
        return delta
    return delta.mul_(words < _bound(density)).div_(density)


def _bound(p: float) -> int:
    """Return the number below which a share p of all signed 32-bit integers lies."""
    return round(p * (1 << 32)) - (1 << 31)


def drop_by_rank_(
    delta: Tensor,  # (rows, columns), changed in place
    words: Tensor,  # random, as `delta`
    density: float,
) -> Tensor:
    """Keep each element with a probability that grows with its magnitude's rank in its row, and divide by it (23).

    The least of a row is kept with probability density − ε, the largest with density + ε.
    """
    if density >= 1:
        return delta
    p = probabilities(delta, density)
    bounds = (p * (1 << 32)).round_().sub_(1 << 31)
    return delta.mul_(words.double() < bounds).div_(p.to(delta.dtype))


def probabilities(delta: Tensor, density: float) -> Tensor:
    """Return the probability that DELLA keeps each element of some rows, in float64; equal ones rank by column."""
    spread, columns = spread_of(density), delta.shape[1]
    order = delta.abs().argsort(dim=1, stable=True)
    steps = torch.arange(columns, dtype=torch.float64, device=delta.device).div_(max(1, columns - 1))
    ranked = steps.mul_(2 * spread).add_(density - spread) if columns > 1 else steps.add_(density)
    return torch.empty_like(delta, dtype=torch.float64).scatter_(1, order, ranked.expand_as(order))


def spread_of(density: float) -> float:
    """Return ε for a density: so small that all probabilities lie above 0 and at most at 1."""
    return min(SPREAD, density / 2, 1 - density)


def add_up_(
    W: Tensor,  # changed in place
    deltas: Sequence[Tensor],
    weights: Sequence[float],
) -> Tensor:
    """Compute W + Σ wᵢ·δᵢ."""
    for delta, weight in zip(deltas, weights, strict=True):
        W.add_(delta, alpha=weight)
    return W


def elect_(
    W: Tensor,  # changed in place
    deltas: Tensor,  # one change after another, each as W; overwritten
    weights: Sequence[float],
    majority: str,
    work: Sequence[Tensor],  # two more as W
    marks: Sequence[Tensor],  # bool as `deltas`, and uint8 as W; int32 for more than 255 changes
) -> Tensor:
    """Add to W the mean of wᵢ·δᵢ over the changes whose sign is the majority's (24, TIES).

    "total" elects the sign of Σ δᵢ, "frequency" the sign of Σ sign(δᵢ); zero counts as positive.
    """
    (signs, total), (agrees, count) = work, marks
    _votes(deltas, majority, signs, total).ge_(0.0).mul_(2.0).sub_(1.0)
    agrees.copy_(deltas.mul_(signs).clamp_(min=0.0))
    torch.sum(agrees.view(torch.uint8), dim=0, dtype=count.dtype, out=count)
    torch.mul(deltas[0], weights[0], out=total)
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    total.mul_(signs)
    return W.addcdiv_(total, signs.copy_(count).clamp_(min=1.0))


def _votes(deltas: Tensor, majority: str, out: Tensor, vote: Tensor) -> Tensor:
    """Return the sum of all changes, or of their signs; `vote` is scratch space."""
    if majority == "total":
        torch.add(deltas[0], deltas[1], out=out) if len(deltas) > 1 else out.copy_(deltas[0])
        for delta in deltas[2:]:
            out.add_(delta)
        return out
    torch.sign(deltas[0], out=out)
    for delta in deltas[1:]:
        out.add_(torch.sign(delta, out=vote))
    return out
