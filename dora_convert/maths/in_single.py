"""Combine changes in float32, and mark the elements that float64 might elect or round otherwise.

Pruned changes come in, of which each is off by a known error at most. Their sum or mean is added to W, and every
element is marked that is nearer to a tie of the output's dtype than its error, or whose vote is nearer to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Scratch = Callable[[str, Sequence[int], torch.dtype], Tensor]
"""Returns memory by name, shape and dtype, which the next call of the name reuses."""
TINY = 2.0**-125
"""A vote of zero counts as positive: so much is added to each, which is less than any error."""
RELATIVE = 2.0**-22
"""Four roundings: of W plus the change, of a bound, and two to spare."""


class CombineRule(NamedTuple):
    """The way in which pruned changes become one."""

    weights: Sequence[float]
    majority: str
    """ "total" or "frequency" elects signs; "" adds all changes up."""


class Errors(NamedTuple):
    """The most that float32 may be off by."""

    added: float
    """For the addend of W."""
    vote: float
    """For the sum of the changes."""


def combine(
    rule: CombineRule,
    W: Tensor,  # float32, of one dimension
    kept: Tensor,  # float32, one pruned change after another, each as W
    errors: Errors,
    *,
    work: Tensor,  # as `kept`: scratch space, which may be the same
    out: Tensor,  # as W, in the output's dtype
    scratch: Scratch,
) -> Tensor:  # uint8 as W: zero where `out` is certain
    """Compute the combination's result, rounded into `out`, and return the marks of doubtful elements.

    A change of zero is certain: it was pruned. The sign of every other change is certain, too.
    """
    size, single = W.shape, torch.float32
    vote, sign = (scratch(name, size, single) for name in ("vote", "sign"))
    if rule.majority:
        kept = _agreeing(kept, rule.majority, vote, sign, out=work)
    agrees = scratch("agrees", kept.shape, torch.bool)
    ones = agrees.copy_(kept).view(torch.uint8)
    count = torch.sum(ones, 0, dtype=torch.uint8, out=scratch("count", size, torch.uint8))
    total, share = (scratch(name, size, single) for name in ("total", "share"))
    _add_up(kept, rule.weights, total)
    doubts = scratch("doubts", size, torch.uint8).zero_()
    if rule.majority:
        share.copy_(count)
        if rule.majority == "total":  # where the vote may have another sign, and any change has a vote
            _inside_(vote, share, errors.vote)
            doubts.copy_(agrees[0].copy_(vote).view(torch.uint8))
        total = torch.addcdiv(W, total.mul_(sign), share.clamp_(min=1.0), out=vote)
    else:
        total.add_(W)
    out.copy_(total)
    changed = agrees[0].copy_(count).view(torch.uint8)  # of all others the result is W
    return doubts.bitwise_or_(_near_tie(total, errors.added, out.dtype, scratch).bitwise_and_(changed))


def _agreeing(kept: Tensor, majority: str, vote: Tensor, sign: Tensor, *, out: Tensor) -> Tensor:
    """Compute the vote and its sign; return the changes' magnitudes if they have this sign, else zero."""
    if majority == "total":
        _add_up(kept, [1.0] * len(kept), vote)
    else:
        torch.sign(kept[0], out=vote)
        for change in kept[1:]:
            vote.add_(torch.sign(change, out=sign))
    torch.sign(vote.add_(TINY), out=sign)
    for change, agreeing in zip(kept, out, strict=True):
        torch.mul(change, sign, out=agreeing).clamp_(min=0.0)
    return out


def _inside_(near: Tensor, x: Tensor, error: float) -> None:
    """Set `near` to x where it is nearer to zero than an error, else to zero."""
    torch.ops.aten.hardtanh_backward.grad_input(x, near, -error, error, grad_input=near)


def _add_up(changes: Tensor, weights: Sequence[float], out: Tensor) -> Tensor:
    """Return Σ wᵢ·δᵢ."""
    first = 1
    if len(changes) > 1 and weights[0] == 1:
        torch.add(changes[0], changes[1], alpha=weights[1], out=out)
        first = 2
    else:
        torch.mul(changes[0], weights[0], out=out)
    for change, weight in zip(changes[first:], weights[first:], strict=True):
        out.add_(change, alpha=weight)
    return out


def _near_tie(x: Tensor, error: float, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Return ones where x plus and x less its error round to different numbers of a dtype; zeros elsewhere.

    Rounding is monotone and the same on both sides of zero, so magnitudes are looked at. A lower bound below zero has
    another sign, which makes it another number.
    """
    size, bound = (torch.abs(x, out=scratch("sign", x.shape, x.dtype)), scratch("share", x.shape, x.dtype))
    far, integers = torch.tensor([-error / RELATIVE]), torch.int16
    lower, upper = (scratch(name, x.shape, dtype) for name in ("lower", "upper"))
    lower.copy_(torch.lerp(size, far, RELATIVE, out=bound))  # (1 − r)·|x| − error
    upper.copy_(torch.lerp(size, far, -RELATIVE, out=bound))  # (1 + r)·|x| + error
    differ = torch.bitwise_xor(lower.view(integers), upper.view(integers), out=lower.view(integers))
    return scratch("near", x.shape, torch.bool).copy_(differ).view(torch.uint8)
