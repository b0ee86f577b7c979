"""Combine changes in float32, and mark the elements that float64 might elect or round otherwise.

Pruned changes come in, of which each is off by a known error at most. Their sum or mean is added to W, and every
element is marked that is nearer to a tie of bfloat16 than its error, or whose vote is nearer to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Scratch = Callable[[str, Sequence[int], torch.dtype], Tensor]
"""Returns memory by name, shape and dtype, which the next call of the name reuses."""
SINGLE = 2.0**-24
"""The most that a rounding to float32 changes a number, as a share of it."""
TINY = 2.0**-125
"""A vote of zero counts as positive: so much is added to each, which is less than any error."""


class CombineRule(NamedTuple):
    """The way in which pruned changes become one."""

    weights: Sequence[float]
    majority: str
    """ "total" or "frequency" elects signs; "" adds all changes up."""


class Errors(NamedTuple):
    """The most that float32 may be off by."""

    share: float
    """For the result: this part of its magnitude,"""
    added: Tensor  # (rows, 1), float32
    """and so much more."""
    vote: float
    """For the sum of the changes."""


def combine(
    rule: CombineRule,
    W: Tensor,  # (rows, columns), float32
    kept: Tensor,  # (changes, rows, columns), float32: pruned changes, overwritten
    errors: Errors,
    *,
    out: Tensor,  # as W, in bfloat16
    scratch: Scratch,
) -> Tensor:  # uint8 as W: zero where `out` is certain
    """Compute the combination's result, rounded into `out`, and return the marks of doubtful elements.

    A change of zero is certain: it was pruned. The sign of every other change is certain, too.
    """
    if not rule.majority:
        return _round(_add_up(kept, rule.weights, scratch("vote", W.shape, W.dtype)).add_(W), errors, out, scratch)
    vote, sign, total = (scratch(name, W.shape, W.dtype) for name in ("vote", "sign", "total"))
    _elect(kept, rule.majority, vote, sign)
    for change in kept:
        change.mul_(sign).clamp_(min=0.0)
    agrees = scratch("agrees", kept.shape, torch.bool).copy_(kept).view(torch.uint8)
    count = torch.sum(agrees, 0, dtype=torch.uint8, out=scratch("count", W.shape, torch.uint8))
    _add_up(kept, rule.weights, total).mul_(sign)
    share = sign.copy_(count)
    unsure = scratch("unsure", W.shape, torch.bool)
    if rule.majority == "total":  # the vote may have another sign, if any change has a vote
        unsure.copy_(_near_zero_(vote, share, errors.vote))
    doubts = _round(torch.addcdiv(W, total, share.clamp_(min=1.0), out=vote), errors, out, scratch)
    return doubts.bitwise_or_(unsure.view(torch.uint8)) if rule.majority == "total" else doubts


def _elect(kept: Tensor, majority: str, vote: Tensor, sign: Tensor) -> None:
    """Compute the vote and its sign."""
    if majority == "total":
        _add_up(kept, [1.0] * len(kept), vote)
    else:
        torch.sign(kept[0], out=vote)
        for change in kept[1:]:
            vote.add_(torch.sign(change, out=sign))
    torch.sign(vote.add_(TINY), out=sign)


def _near_zero_(x: Tensor, value: Tensor, error: float) -> Tensor:
    """Set x to a value where it is nearer to zero than an error, else to zero."""
    near: Tensor = torch.ops.aten.hardtanh_backward.grad_input(value, x, -error, error, grad_input=x)
    return near


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


def _round(x: Tensor, errors: Errors, out: Tensor, scratch: Scratch) -> Tensor:
    """Round x into `out`; return marks where x plus and x less its error round to different numbers.

    Rounding is monotone, so that all numbers between round as both ends do.
    """
    error = torch.abs(x, out=scratch("sign", x.shape, x.dtype))
    torch.add(errors.added, error, alpha=errors.share, out=error)
    lower = scratch("lower", x.shape, out.dtype).copy_(torch.sub(x, error, out=scratch("total", x.shape, x.dtype)))
    out.copy_(x.add_(error))
    integers = torch.int16
    differ = torch.bitwise_xor(lower.view(integers), out.view(integers), out=lower.view(integers))
    return scratch("doubts", x.shape, torch.bool).copy_(differ).view(torch.uint8)


def marked(
    marks: Tensor,  # uint8 or bool, of one dimension
) -> Tensor:
    """Return the places of the few marks that are not zero; eight are looked at together."""
    if len(marks) % 8:
        return marks.nonzero().squeeze(1)
    groups = marks.view(torch.int64)
    hits = groups.nonzero().squeeze(1)
    inside = groups[hits].view(torch.bool).nonzero().squeeze(1)
    return hits.mul_(8)[inside >> 3].add_(inside.bitwise_and_(7))
