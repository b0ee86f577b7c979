"""Turn blocks of llama.cpp's quantised types into values. ggml-quants.c defines them; the gguf package is the oracle.

Codes of a block lie in planes: `wide` bytes hold the low bits of the first elements, then the next bits of the next
ones. A table names the planes. Scales are float16, or small integers times a float16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .numbers import E2M1, look_up, power, values

if TYPE_CHECKING:
    from torch import Tensor

IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
"""The values of IQ4_NL and IQ4_XS, by code."""
TRITS = (1, 3, 9, 27, 81)
"""Five elements share a byte of TQ1_0: what each multiplies the byte by."""


@dataclass(frozen=True)
class Planes:
    """Codes of a block: the first byte, the bytes, the bytes of a plane, and the bits of a code."""

    first: int
    length: int
    wide: int
    bits: int

    def codes(self, blocks: Tensor) -> Tensor:
        """Return the codes of blocks, uint8 (blocks, elements), from their bytes."""
        import torch

        raw = blocks[:, self.first : self.first + self.length].reshape(len(blocks), -1, self.wide)
        mask = (1 << self.bits) - 1
        planes = [raw >> shift & mask if shift else raw & mask for shift in range(0, 8, self.bits)]
        return torch.stack(planes, dim=2).view(len(blocks), -1)


@dataclass(frozen=True)
class BlockKind:
    """One quantised type: W = scale·(code − middle) − least."""

    elements: int
    planes: tuple[Planes, ...] = ()
    """The low bits, and the bits above them."""
    middle: int = 0
    scales: Callable[[Tensor], tuple[Tensor, Tensor | None]] | None = None
    """Returns scales and least values: float64 (blocks, groups)."""
    table: tuple[float, ...] = ()
    """The values of codes, if they are not the codes themselves."""

    def fill(self, blocks: Tensor, W: Tensor) -> None:
        """Fill W, float64 (blocks, elements), with the values of blocks, from their bytes: uint8 (blocks, bytes)."""
        import torch

        codes = self.planes[0].codes(blocks)
        for plane, below in zip(self.planes[1:], self.planes, strict=False):
            codes |= plane.codes(blocks) << below.bits
        if self.table:
            look_up(codes, self.table, W)
        else:
            W.copy_(codes.sub_(self.middle).view(torch.int8) if self.middle else codes)
        self.scale_(blocks, W)

    def scale_(self, blocks: Tensor, W: Tensor) -> None:
        """Turn codes into values in place: times their scales, less the least values."""
        assert self.scales
        scale, least = self.scales(blocks)
        groups = W.view(len(blocks), scale.shape[1], -1)
        groups.mul_(scale.unsqueeze(2))
        if least is not None:
            groups.sub_(least.unsqueeze(2))


class Bytes8(BlockKind):
    """Q8_0: a scale, and a signed byte for each element."""

    def fill(self, blocks: Tensor, W: Tensor) -> None:
        """Fill W with the values of blocks."""
        import torch

        W.copy_(blocks[:, 2:].view(torch.int8))
        self.scale_(blocks, W)


class Trits(BlockKind):
    """TQ1_0: five elements of three values in a byte, as the digits after the point in base 3."""

    def fill(self, blocks: Tensor, W: Tensor) -> None:
        """Fill W with the values of blocks."""
        import torch

        digits = []
        for first, last, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
            raw = blocks[:, first:last]
            digits += [(raw * power).int() * 3 >> 8 for power in TRITS[:count]]
        W.copy_(torch.cat(digits, dim=1)).sub_(1)
        self.scale_(blocks, W)


def half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at a byte of each block: float64 (blocks, 1)."""
    return values(blocks[:, at : at + 2], "F16")


def _one(at: int) -> Callable[[Tensor], tuple[Tensor, None]]:
    return lambda blocks: (half(blocks, at), None)


def _with_least(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return a scale, and the least value with its sign turned."""
    return half(blocks, 0), half(blocks, 2).neg_()


def _q2(blocks: Tensor) -> tuple[Tensor, Tensor]:
    small = blocks[:, :16]
    return half(blocks, 80) * (small & 15).double(), half(blocks, 82) * (small >> 4).double()


def _q3(blocks: Tensor) -> tuple[Tensor, None]:
    low = Planes(96, 8, 8, 4).codes(blocks)
    high = Planes(104, 4, 4, 2).codes(blocks)
    return half(blocks, 108) * (low | high << 4).double().sub_(32), None


def _q45(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8 scales and 8 least values of 6 bits; the last four of each have their bits in two places."""
    import torch

    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([first & 63, rest & 15 | first >> 2 & 48], dim=1)
    least = torch.cat([second & 63, rest >> 4 | second >> 2 & 48], dim=1)
    return half(blocks, 0) * scale.double(), half(blocks, 2) * least.double()


def _q6(blocks: Tensor) -> tuple[Tensor, None]:
    return half(blocks, 208) * values(blocks[:, 192:208], "I8"), None


def _iq4(blocks: Tensor) -> tuple[Tensor, None]:
    low, high = Planes(4, 4, 1, 4).codes(blocks), Planes(2, 2, 1, 2).codes(blocks)
    return half(blocks, 0) * (low | high << 4).double().sub_(32), None


def _exponent(blocks: Tensor) -> tuple[Tensor, None]:
    return power(blocks[:, :1]), None


KINDS: Mapping[str, BlockKind] = {
    "Q4_0": BlockKind(32, (Planes(2, 16, 16, 4),), 8, _one(0)),
    "Q4_1": BlockKind(32, (Planes(4, 16, 16, 4),), 0, _with_least),
    "Q5_0": BlockKind(32, (Planes(6, 16, 16, 4), Planes(2, 4, 1, 1)), 16, _one(0)),
    "Q5_1": BlockKind(32, (Planes(8, 16, 16, 4), Planes(4, 4, 1, 1)), 0, _with_least),
    "Q8_0": Bytes8(32, scales=_one(0)),
    "Q2_K": BlockKind(256, (Planes(16, 64, 32, 2),), 0, _q2),
    "Q3_K": BlockKind(256, (Planes(32, 64, 32, 2), Planes(0, 32, 32, 1)), 4, _q3),
    "Q4_K": BlockKind(256, (Planes(16, 128, 32, 4),), 0, _q45),
    "Q5_K": BlockKind(256, (Planes(48, 128, 32, 4), Planes(16, 32, 32, 1)), 0, _q45),
    "Q6_K": BlockKind(256, (Planes(0, 128, 64, 4), Planes(128, 64, 32, 2)), 32, _q6),
    "IQ4_NL": BlockKind(32, (Planes(2, 16, 16, 4),), 0, _one(0), IQ4),
    "IQ4_XS": BlockKind(256, (Planes(8, 128, 16, 4),), 0, _iq4, IQ4),
    "TQ1_0": Trits(256, scales=_one(52)),
    "TQ2_0": BlockKind(256, (Planes(0, 64, 32, 2),), 1, _one(64)),
    "MXFP4": BlockKind(32, (Planes(1, 16, 16, 4),), 0, _exponent, E2M1),
}
"""The types that are read."""
