"""Compute the equations of docs/mathematics.md, in their order: tensors in, tensors out.

W is (out, in), A is (r, in), B is (out, r), m and n are (out,), s is the scaling. Blocks of rows of W with
the same rows of B, m and n obey the same equations. All functions compute in the dtype of their arguments,
which is float64 unless asked otherwise. `round_to` rounds once at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOW_BITS = (1 << 29) - 1  # the bits of a float64's fraction that a float32 does not have
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
LEAST_NORMAL = torch.finfo(torch.float32).tiny
RUN = 512  # elements that are rounded again together if one of them needs it


def add_low_rank_(
    W: Tensor,  # (out, in), changed in place
    B: Tensor,  # (out, r)
    A: Tensor,  # (r, in)
    s: float,
) -> Tensor:
    """Compute V = W + s·BA (1), LoRA's merged weight: equation 3 of arXiv:2106.09685."""
    W.addmm_(B, A, alpha=s)
    return W


def norms(V: Tensor, axis: int) -> Tensor:
    """Return n = ‖V‖ (2), one per row for axis 1 and one per column for axis 0."""
    n: Tensor = torch.linalg.vector_norm(V, dim=axis)
    return n


def rescale_(
    V: Tensor,  # (out, in), changed in place
    m: Tensor,  # (out,)
    n: Tensor,  # (out,)
    axis: int,
) -> Tensor:
    """Compute W' = m·V/n (3), DoRA's merged weight: equation 5 of arXiv:2402.09353, transposed."""
    return V.mul_((m / n).unsqueeze(axis))


def block_diagonal(
    stacked: Tensor,  # rows of (rows, columns/blocks), the blocks one below the other
    blocks: int,
    start: int,
    rows: int | None = None,
) -> Tensor:  # as many rows of (rows, columns)
    """Return rows of a block-diagonal matrix from its blocks; `start` is the first of the `rows`."""
    if blocks == 1:
        return stacked
    height, width = (rows or len(stacked)) // blocks, stacked.shape[1]
    dense = stacked.new_zeros(len(stacked), width * blocks)
    for block in range(blocks):
        first, last = max(0, block * height - start), min(len(stacked), (block + 1) * height - start)
        if first < last:
            dense[first:last, block * width : (block + 1) * width] = stacked[first:last]
    return dense


def without_start(
    W: Tensor,  # (out, in), float32
    kind: str,
    r: int,
    s: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (out, in), (out, r), (r, in)
    """Return W without the start of PiSSA, OLoRA or KaSA, and the factors of this start.

    PEFT's operations in PEFT's order give PEFT's bits.
    """
    if kind == "OLoRA":
        Q, R = torch.linalg.qr(W)
        left, right = s * Q[:, :r], R[:r]
        return W - left @ right, left, right
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    if kind == "KaSA":
        return (U[:, :-r] * S[:-r]) @ Vh[:-r], U[:, -r:] * S[-r:], Vh[-r:]
    root = torch.diag(torch.sqrt(S[:r] / s))
    left, right = s * (U[:, :r] @ root), root @ Vh[:r]
    return W - left @ right, left, right


def coefficients(
    f: list[Tensor | None],  # m/n of each edit, which broadcasts over (out, in); None is 1
    weights: list[float],
) -> tuple[Tensor | None, list[Tensor | float]]:
    """Return g and c of W = g·W' − Σ cᵢ·Δᵢ (7), the inverse of (4); zeros for elements without an inverse."""
    if all(each is None for each in f):
        return None, list(weights)
    if len(f) == 1 and f[0] is not None and weights == [1]:
        g = _where_finite(1 / f[0])
        return g, [(g != 0).to(g.dtype)]
    total = 1.0 + sum(w * (each - 1) for each, w in zip(f, weights, strict=True) if each is not None)
    g = _where_finite(1 / torch.as_tensor(total))
    return g, [_where_finite(w * g if each is None else w * each * g) for each, w in zip(f, weights, strict=True)]


def _where_finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)


def to_fixed_(
    x: Tensor,  # changed in place
    largest: float,  # |x| is at most this
    terms: int,
) -> Tensor:
    """Round x to a grid so coarse that sums of `terms` products of two such factors are exact, in any order.

    With b = ⌊(53 − ⌈log₂ r⌉)/2⌋ bits each, r products add up to at most 2⁵³ units, which float64 holds.
    """
    bits = (53 - max(0, terms - 1).bit_length()) // 2
    unit = math.ldexp(1.0, math.frexp(largest)[1] - bits)
    return x.div_(unit).round_().mul_(unit)


def ordinals(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return each value's ordinal among all values of its dtype: a bijection, with −0 right below +0."""
    return _folded(x.view(INTEGERS[x.element_size()]), out)


def at_ordinals(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values that have these ordinals."""
    return _folded(numbers).view(dtype)


def _folded(bits: Tensor, out: Tensor | None = None) -> Tensor:
    """Reverse the order of negative numbers; applied twice, this is the identity."""
    top = torch.tensor(8 * bits.element_size() - 1, dtype=bits.dtype)
    negative = torch.bitwise_right_shift(bits, top, out=out)  # all bits, or none
    return negative.bitwise_and_(torch.iinfo(bits.dtype).max).bitwise_xor_(bits)


def round_to(
    x: Tensor,
    out: Tensor,  # as x, in the dtype to round to
    single: Tensor | None = None,  # as x, float32: scratch space
) -> Tensor:
    """Round x once into `out`, to nearest and ties to even.

    torch rounds float64 to half precision by way of float32. If the first rounding lands on a tie of the
    second, the result is off by one ulp: about once in 130,000 elements for bfloat16 and once in 16,000 for
    float16. A first rounding to odd makes the second rounding right.

    A processor looks for ties first: few elements are near one. A device would stall at the answer, and rounds all
    elements to odd. Both ways give the same bits.
    """
    if x.dtype != torch.float64 or out.element_size() > 2 or x.numel() == 0:
        return out.copy_(x)
    y = torch.empty_like(x, dtype=torch.float32) if single is None else single
    if x.device.type != "cpu" or out.element_size() == 1:
        return out.copy_(to_odd_(x, y))
    if out.dtype == torch.float16:
        return out.copy_(y.copy_(to_odd_bits(x.view(torch.int64)).view(torch.float64)))
    return round_bfloat16(x, y, y.view(torch.int16), out)


def round_bfloat16(
    x: Tensor,  # float64
    y: Tensor,  # as x, float32: overwritten
    halves: Tensor,  # y as int16
    out: Tensor,  # as x, bfloat16
    run: int = RUN,
    least: float = LEAST_NORMAL,
) -> Tensor:
    """Round x once into `out`, on a processor; TorchScript compiles this, too."""
    y.copy_(x)
    width = run if x.numel() % run == 0 else x.numel()
    runs, exact = y.view(-1, width), x.view(-1, width)
    # A tie of bfloat16 is a float32 whose low half is 0x8000, the least value an int16 can have.
    ties = (halves.view(len(runs), -1).amin([1]) == -(1 << 15)).nonzero().squeeze(1)
    if ties.size(0):
        near = exact[ties]
        near = _on_grid(near) if near.abs().amin().item() < least else near
        odd = to_odd_bits(torch.view_copy(near, dtype=torch.int64))
        runs[ties] = torch.view_copy(odd, dtype=torch.float64).to(torch.float32)
    return out.copy_(y)


def to_odd_(
    x: Tensor,  # float64
    y: Tensor,  # as x, float32: overwritten
) -> Tensor:
    """Cut x to float32, and set the last bit if any bit was lost; no step waits for a value.

    A first copy rounds to nearest. If it rounded up in magnitude, the float32 below is one integer less. This holds
    for subnormal numbers, too, and for infinity, whose neighbour is the largest number.
    """
    bits = y.copy_(x).view(torch.int32)
    inexact, larger = y.ne(x), y.abs().gt(x.abs())
    bits.add_(larger, alpha=-1).bitwise_or_(inexact)
    return y


def to_odd_bits(
    bits: Tensor,  # of float64, as int64
    low: int = LOW_BITS,
) -> Tensor:
    """Cut x to float32's precision, and set the last bit if any bit was lost (Boldo and Melquiond, 2008)."""
    odd = bits & low
    odd += low  # carries into the last bit that stays
    odd |= bits
    odd &= -1 - low
    return odd


def _on_grid(x: Tensor, least: float = LEAST_NORMAL) -> Tensor:
    """Round x to multiples of 2⁻¹³³, bfloat16's smallest number, below float32's normal numbers."""
    grid = 1.5 * 2.0 ** (52 - 133)
    return torch.where(x.abs() < least, ((x + grid) - grid).copysign(x), x)


def all_finite(x: Tensor) -> bool:
    """Return True if no element is NaN or infinite; a finite sum proves it, but a sum may overflow."""
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())
