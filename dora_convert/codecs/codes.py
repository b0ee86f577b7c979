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


class NearestCodes:
    """Finds the codes of the nearest values of a table of at most 256; of two, the lesser value's.

    Each cell of a regular grid has at most one middle of two values: that a value may lie on either side of.
    """

    def __init__(self, table: Tensor) -> None:
        import torch

        order = table.argsort()
        self._middles = (table[order][1:] + table[order][:-1]) / 2
        self._order = order.to(torch.uint8)
        first, width = float(self._middles[0]), float(self._middles[-1] - self._middles[0])
        self._limits: Tensor | None = None
        for self._cells in (1 << 6, 1 << 9, 1 << 12):
            self._scale = (self._cells - 1) / max(width, 1e-300)
            self._shift = torch.tensor(-first * self._scale, dtype=torch.float32, device=table.device)
            taken = self._cell(self._middles)
            if bool((taken.diff() > 0).all()):
                self._limits = self._middles.new_full((self._cells,), torch.inf).index_put_((taken,), self._middles)
                before = torch.searchsorted(taken, torch.arange(self._cells, dtype=taken.dtype, device=table.device))
                sides = torch.stack([before, (before + 1).clamp_(max=len(taken))], dim=1).flatten()
                self._codes = self._order[sides]
                return

    def __call__(self, x: Tensor) -> Tensor:
        """Return the codes of some values in one line: uint8."""
        import torch

        if self._limits is None:
            return self._order[torch.bucketize(x, self._middles)]
        return torch.cat([self._of(x[first : first + PIECE_ELEMENTS]) for first in range(0, len(x), PIECE_ELEMENTS)])

    def _of(self, x: Tensor) -> Tensor:
        assert self._limits is not None
        cell = self._cell(x)
        above = x > picked(self._limits, cell)
        return picked(self._codes, cell.mul_(2).add_(above))

    def _cell(self, x: Tensor) -> Tensor:
        """Return the cell that each value lies in, int32; no larger value has a smaller cell."""
        import torch

        place = torch.add(self._shift, x.to(torch.float32), alpha=self._scale)
        return place.clamp_(0, self._cells - 1).to(torch.int32)


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
