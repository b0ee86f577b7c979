"""Tell which number some bits are, by the definition of each dtype."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..storage.safetensors import BITS

SMALL_FLOATS = {"F8_E4M3": (4, 3), "F8_E5M2": (5, 2), "E2M1": (2, 1)}
"""The bits of exponent and mantissa of floats of 8 bits and fewer."""


def number(bits: Tensor, dtype: str) -> Tensor:
    """Return the number of a stored dtype that some bits are."""
    match dtype:
        case "F8_E4M3" | "F8_E5M2":
            return table_of(dtype).index_select(0, bits.flatten()).view(bits.shape)
        case "F16":
            return float_value(bits, exponent=5, mantissa=10)
        case "BF16":
            return float_value(bits, exponent=8, mantissa=7)
        case "F32":
            return float_value(bits, exponent=8, mantissa=23)
        case "F8_E8M0":
            return torch.pow(torch.tensor(2.0, dtype=torch.float64), (bits - 127).double())
        case "U8":
            return bits.double()
    size = BITS[dtype]
    return torch.where(bits >= 1 << size - 1, bits - (1 << size), bits).double() if size < 64 else bits.double()


@cache
def table_of(dtype: str) -> Tensor:
    """Return the numbers of all bits of a small float."""
    exponent, mantissa = SMALL_FLOATS[dtype]
    return float_value(torch.arange(2 << exponent + mantissa), exponent=exponent, mantissa=mantissa)


def float_value(bits: Tensor, *, exponent: int, mantissa: int) -> Tensor:
    """Return (−1)^sign · 2^(e − bias) · 1.m, or 0.m for e = 0; no values are infinite or NaN."""
    sign = bits >> exponent + mantissa & 1
    e = bits >> mantissa & (1 << exponent) - 1
    m = (bits & (1 << mantissa) - 1).double() / 2**mantissa
    bias = 2 ** (exponent - 1) - 1
    power = torch.where(e > 0, e, torch.ones_like(e)) - bias
    value = torch.where(e > 0, 1 + m, m) * torch.pow(torch.tensor(2.0, dtype=torch.float64), power.double())
    return torch.where(sign > 0, -value, value)
