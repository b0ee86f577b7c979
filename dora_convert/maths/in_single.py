"""Combine changes in float32, and mark the elements that float64 might elect or round otherwise.

Changes come in of which each is off by a known error at most. They are pruned, and their sum or mean is added to W. An
element is marked that is nearer to a tie of bfloat16 than its error, or whose vote is nearer to zero. TorchScript
compiles what other files call (scripted.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..scripted import Scripted
from .block_steps import change_rows, elements_of, places_of, some_columns, some_rows

SINGLE = 2.0**-24
"""The most that a rounding to float32 changes a number, as a share of it."""


class CombineRule(NamedTuple):
    """The way in which pruned changes become one."""

    weights: list[float]
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


def add_up(changes: Tensor, weights: list[float], out: Tensor) -> Tensor:
    """Compute Σ wᵢ·δᵢ."""
    first = 1
    if len(changes) > 1 and weights[0] == 1.0:
        torch.add(changes[0], changes[1], alpha=weights[1], out=out)
        first = 2
    else:
        torch.mul(changes[0], weights[0], out=out)
    for k in range(first, len(changes)):
        out.add_(changes[k], alpha=weights[k])
    return out


def elect_signs(kept: Tensor, majority: str, vote: Tensor, sign: Tensor, tiny: float) -> None:
    """Compute the vote of some changes, and its sign; a vote of zero counts as positive, so `tiny` is added."""
    if majority == "total":
        add_up(kept, [1.0] * len(kept), vote)
    else:
        torch.sign(kept[0], out=vote)
        for k in range(1, len(kept)):
            vote.add_(torch.sign(kept[k], out=sign))
    torch.sign(vote.add_(tiny), out=sign)


def combine_rows(
    W: Tensor,  # float32 or float64, overwritten
    kept: Tensor,  # (changes, rows, columns): pruned changes, overwritten
    weights: list[float],
    majority: str,
    vote_error: float,
    tiny: float,  # less than any error
    work: Tensor,  # (3, rows, columns), as W
    flags: list[Tensor],  # `agrees` and `counts` as below, or `counts` alone
) -> Tensor:
    """Return the combination's result, in place of W; mark doubtful votes in the first of `work` by other than zero."""
    vote, sign, total = work[0], work[1], work[2]
    if majority == "":
        vote.zero_()
        return W.add_(add_up(kept, weights, total))
    elect_signs(kept, majority, vote, sign, tiny)
    kept.mul_(sign).clamp_(min=0.0)
    counts = flags[-1]
    if len(flags) > 1:
        flags[0].copy_(kept)
    else:
        counts[:-1].copy_(kept > 0.0)
    count = torch.sum(counts[:-1], [0], dtype=torch.uint8, out=counts[-1])
    add_up(kept, weights, total).mul_(sign)
    sign.copy_(count)
    if majority == "total":  # the vote may have another sign, if any change has a vote
        torch.ops.aten.hardtanh_backward(sign, vote, -vote_error, vote_error, grad_input=vote)
    else:
        vote.zero_()
    return torch.addcdiv(W, total, sign.clamp_(min=1.0), out=W)


def round_rows(
    x: Tensor,  # float32, overwritten
    doubtful: Tensor,  # other than zero where x is in doubt anyway
    share: float,
    added: Tensor,  # (rows, 1)
    work: Tensor,  # (2, rows, columns), float32
    lower: Tensor,  # bfloat16
    upper: Tensor,  # bfloat16
) -> None:
    """Round x less its error into `lower`, and x plus its error into `upper`.

    Rounding is monotone, so that all numbers between round as both do, if these are equal.
    """
    error = torch.add(added, torch.abs(x, out=work[0]), alpha=share, out=work[0])
    error.add_(doubtful, alpha=2.0**100)
    lower.copy_(torch.sub(x, error, out=work[1]))
    upper.copy_(x.add_(error))


@Scripted
def combine_block(
    raw: Tensor,  # (rows, columns)
    changes: list[list[Tensor]],  # g, left and right of each
    cuts: list[float],  # magnitudes up to these are pruned
    weights: list[float],
    majority: str,  # "total" or "frequency" elects signs; "" adds all changes up
    errors: list[float],  # of the result, as a share of its magnitude; of the vote
    added: Tensor,  # (rows, 1), float32: so much more error of the result
    scratch: Tensor,  # (4 + changes, some rows, some columns), float32
    agrees: Tensor,  # (changes, some rows, some columns), bool
    counts: Tensor,  # (changes + 1, some rows, some columns), uint8, of which the first are the memory of `agrees`
    lower: list[Tensor],  # (some rows, some columns): bfloat16, and the same memory as int16
    out: list[Tensor],  # (rows, columns): bfloat16, and the same memory as int16
    marks: Tensor,  # (rows, columns), bool
) -> None:
    """Prune the changes of a block, and round their combination with it into `out`; mark the doubtful elements.

    Each change is off by a known error at most. A change of zero was pruned, and is certain. So is the sign of any
    other one.
    """
    for start in range(0, raw.size(1), scratch.size(2)):
        stop = min(start + scratch.size(2), raw.size(1))
        width = stop - start
        parts = [[some_columns(each[0], start, stop), each[1], each[2][:, start:stop]] for each in changes]
        for first in range(0, len(raw), scratch.size(1)):
            last = min(first + scratch.size(1), len(raw))
            height = last - first
            singles, upper = scratch[:, :height, :width], [each[first:last, start:stop] for each in out]
            W, work, kept = singles[0].copy_(raw[first:last, start:stop]), singles[1:4], singles[4:]
            for k, part in enumerate(parts):
                g, left = some_rows(part[0], first, last), part[1][first:last]
                torch.ops.aten.hardshrink(change_rows(W, g, left, part[2], kept[k]), cuts[k], out=kept[k])
            flags = [agrees[:, :height, :width], counts[:, :height, :width]]
            x = combine_rows(W, kept, weights, majority, vote_error=errors[1], tiny=2.0**-125, work=work, flags=flags)
            low = [each[:height, :width] for each in lower]
            round_rows(x, work[0], errors[0], added[first:last], work=work[1:], lower=low[0], upper=upper[0])
            marks[first:last, start:stop].copy_(torch.bitwise_xor(low[1], upper[1], out=low[1]))


@Scripted
def exact_elements(
    raw: Tensor,  # (rows, columns)
    marks: Tensor,  # (rows, columns), bool
    groups: Tensor,  # the same memory, as `places_of` takes it
    near: Tensor,  # flat places of more doubtful elements
    changes: list[list[Tensor]],  # f, left and turned right of each, float64
    scales: list[float],
    cuts: list[float],  # magnitudes up to these are pruned
    weights: list[float],
    majority: str,
) -> tuple[Tensor, Tensor]:
    """Return the places of the doubtful elements, and their combination's result in float64."""
    marks.view(-1).index_fill_(0, near, True)
    places = places_of(marks, groups)
    rows, columns = places // raw.size(1), places % raw.size(1)
    W = raw.view(-1).index_select(0, places).to(torch.float64)
    kept = torch.empty(len(changes), len(W), dtype=torch.float64)
    for k, change in enumerate(changes):
        torch.ops.aten.hardshrink(elements_of(W, change, scales[k], rows, columns), cuts[k], out=kept[k])
    if majority == "":
        for k, weight in enumerate(weights):
            W.add_(kept[k], alpha=weight)
        return places, W
    work = torch.empty(3, len(W), dtype=torch.float64)
    flags = [torch.empty(len(changes) + 1, len(W), dtype=torch.uint8)]
    return places, combine_rows(W, kept, weights, majority, vote_error=0.0, tiny=2.0**-1074, work=work, flags=flags)
