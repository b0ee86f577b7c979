"""Turn values into codes: the nearest ones of small floats and of tables, and codes into bytes without gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .numbers import PIECE_ELEMENTS, TORCH_NAMES, picked

if TYPE_CHECKING:
    from torch import Tensor

RUN = 512
"""Elements that are looked at together for a tie."""
ONE = 127 << 23
"""The bits of 1.0 in float32."""


def to_float8(x: Tensor, dtype: str) -> Tensor:
    """Round float64 to a float of 8 bits, once.

    Halfway between two floats of 8 bits, a float32 has 19 low bits that are zero.
    """
    import torch

    return _single(x, 0x7FFFF).to(getattr(torch, TORCH_NAMES[dtype]))


def _single(x: Tensor, low: int) -> Tensor:
    """Round float64 to float32 for another rounding: to odd where the `low` bits are zero, which may be a tie.

    Runs of elements that hold such a number are looked at again.
    """
    import torch

    single = x.to(torch.float32)
    width = RUN if x.numel() % RUN == 0 else x.numel()
    bits, exact = single.view(torch.int32).view(-1, width), x.reshape(-1, width)
    runs = ((bits & low).amin(1) == 0).nonzero().flatten() if x.numel() else ()
    if len(runs):
        mine, wide = bits[runs], exact[runs]
        value = mine.view(torch.float32).double()
        odd = (mine - (value.abs() > wide.abs()).to(torch.int32)) | (value != wide).to(torch.int32)
        bits[runs] = torch.where(mine & low == 0, odd, mine)
    return single


def to_e2m1(x: Tensor) -> Tensor:
    """Return the codes of the nearest values of the 4-bit float, ties to an even code.

    Between 2^e and 2^(e + 1), codes stand half of 2^e apart, and below 1 as above it. A sum with 2^(e + 22) has no
    finer bits: its last bits count such steps.
    """
    import torch

    bits = _single(x, 0x1FFFFF).view(torch.int32)
    sign = (bits >> 28).bitwise_and_(8)
    size = bits.bitwise_and_(0x7FFFFFFF)
    power = (size & 0xFF << 23).clamp_(min=ONE)
    large = power + (22 << 23)
    code = size.view(torch.float32).add_(large.view(torch.float32)).view(torch.int32).sub_(large)
    return code.add_(power.sub_(ONE).bitwise_right_shift_(22)).add_(sign).to(torch.uint8)


def nearest_codes(x: Tensor, table: Tensor) -> Tensor:
    """Return the codes of the nearest values of a table of at most 256, uint8; of two, the lesser value's.

    A grid finds the only middle of two values that x may lie on either side of.
    """
    import torch

    order = table.argsort()
    middles = (table[order][1:] + table[order][:-1]) / 2
    for cells in (1 << 6, 1 << 9, 1 << 12):
        start, scale = float(middles[0]), (cells - 1) / float((middles[-1] - middles[0]).clamp(min=1e-300))
        taken = _cells(middles, start, scale, cells)
        if bool((taken.diff() > 0).all()):
            break
    else:
        return order.to(torch.uint8)[torch.bucketize(x, middles)]
    limit = middles.new_full((cells,), torch.inf).index_put_((taken,), middles)
    before = torch.searchsorted(taken, torch.arange(cells, device=x.device))
    codes = order.to(torch.uint8)[torch.stack([before, (before + 1).clamp_(max=len(middles))], dim=1)].flatten()

    def coded(x: Tensor) -> Tensor:
        cell = _cells(x, start, scale, cells)
        above = x > picked(limit, cell)
        return picked(codes, cell.mul_(2).add_(above))

    return torch.cat([coded(x[first : first + PIECE_ELEMENTS]) for first in range(0, len(x), PIECE_ELEMENTS)])


def _cells(x: Tensor, start: float, scale: float, cells: int) -> Tensor:
    """Return the cell of a regular grid that each value lies in, int32; no larger value has a smaller cell."""
    import torch

    return x.to(torch.float32).sub_(start).mul_(scale).clamp_(0, cells - 1).to(torch.int32)


def packed(codes: Tensor, bits: int, row_bytes: int) -> Tensor:
    """Return codes of some bits without gaps, low bits first: uint8 (rows, row_bytes)."""
    import torch

    if bits == 8:
        return codes.contiguous()
    count = row_bytes * 8 // bits if 8 % bits == 0 else -(-codes.shape[1] // 8) * 8
    codes = torch.nn.functional.pad(codes, (0, max(0, count - codes.shape[1])))
    if 8 % bits:
        bit = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
        codes, bits = bit.flatten(1), 1
    if bits == 4:
        two = codes.contiguous().view(torch.int16)
        return (two >> 4).bitwise_or_(two).to(torch.uint8)[:, :row_bytes]
    pieces = codes.view(len(codes), -1, 8 // bits)
    out = sum((pieces[..., k] << bits * k for k in range(8 // bits)), torch.zeros_like(pieces[..., 0]))
    short = row_bytes - out.shape[1]
    return torch.nn.functional.pad(out, (0, short)) if short > 0 else out[:, :row_bytes]
