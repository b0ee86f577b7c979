"""Do the steps of pruning and combining low-rank changes in float32, some rows of a block at a time.

torch compiles these functions (maths/compiled.py), so they use only what TorchScript has, and no constants of the file.
The rows that are taken together, as many as `scratch` has, stay in a processor's own cache.

A change is g·W + left·right. Each of the lists has one entry for each change; an empty g is zero. g is (rows, 1) or
(1, columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import CompiledFunctions


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


def marked(
    marks: Tensor,  # bool
    groups: Tensor,  # the same memory as int64; `marks` again if eight are not a divisor
) -> Tensor:
    """Return the flat places of the few marks that are True; eight are looked at together."""
    if groups.dtype == marks.dtype:
        return marks.view(-1).nonzero().squeeze(1)
    hits = groups.nonzero().squeeze(1)
    inside = marks.view(-1, 8).index_select(0, hits).view(-1).nonzero().squeeze(1)
    return hits.mul_(8).index_select(0, inside.bitwise_right_shift(3)).add_(inside.bitwise_and_(7))


def count_block(
    W: Tensor,  # (rows, columns), float64 or narrower
    change: list[Tensor],  # g, left and right
    bounds: list[float],  # low and high
    scratch: Tensor,  # (2, some rows, some columns), float32
    chosen: Tensor,  # (rows, columns), float32, overwritten
    marks: Tensor,  # (rows, columns), bool, overwritten
    groups: Tensor,  # the same memory, as `marked` takes it
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
    places = marked(marks, groups)
    return chosen.view(-1).index_select(0, places), places, W.view(-1).index_select(0, places), above


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


def elect_signs(kept: Tensor, majority: str, vote: Tensor, sign: Tensor) -> None:
    """Compute the vote of some changes, and its sign; a vote of zero counts as positive."""
    if majority == "total":
        add_up(kept, [1.0] * len(kept), vote)
    else:
        torch.sign(kept[0], out=vote)
        for k in range(1, len(kept)):
            vote.add_(torch.sign(kept[k], out=sign))
    torch.sign(vote.add_(2.0**-125), out=sign)  # so little is less than any error


def combine_rows(
    W: Tensor,  # float32, overwritten
    kept: Tensor,  # (changes, rows, columns): pruned changes, overwritten
    weights: list[float],
    majority: str,
    vote_error: float,
    work: Tensor,  # (3, rows, columns), float32
    flags: list[Tensor],  # `agrees` and `counts` as below
) -> Tensor:
    """Return the combination's result, in place of W; mark doubtful votes in the first of `work` by other than zero."""
    vote, sign, total = work[0], work[1], work[2]
    if majority == "":
        vote.zero_()
        return W.add_(add_up(kept, weights, total))
    elect_signs(kept, majority, vote, sign)
    kept.mul_(sign).clamp_(min=0.0)
    flags[0].copy_(kept)
    counts = flags[1]
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
            x = combine_rows(W, kept, weights, majority, vote_error=errors[1], work=work, flags=flags)
            low = [each[:height, :width] for each in lower]
            round_rows(x, work[0], errors[0], added[first:last], work=work[1:], lower=low[0], upper=upper[0])
            marks[first:last, start:stop].copy_(torch.bitwise_xor(low[1], upper[1], out=low[1]))


STEPS = CompiledFunctions(
    (
        change_rows,
        some_rows,
        some_columns,
        marked,
        count_block,
        add_up,
        elect_signs,
        combine_rows,
        round_rows,
        combine_block,
    )
)
