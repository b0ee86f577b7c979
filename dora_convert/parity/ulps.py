"""Rounding, worked out in float64 by its definition: for checking, not for merging."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.precision import TORCH

GRID = {"BF16": (8, -126), "F16": (11, -14), "F32": (24, -126), "F64": (53, -1022)}
"""Precision in bits and the least exponent of each dtype."""


def half_ulp(x: Tensor, dtype: str) -> Tensor:
    """Half the distance between neighbours of x in a dtype."""
    precision, least = GRID[dtype]
    exponent = (x.view(torch.int64) >> 52 & 0x7FF).clamp_(min=least + 1023)  # biased, as float64 stores it
    return (exponent.sub_(precision) << 52).view(torch.float64)


def nearest(x: Tensor, dtype: str) -> Tensor:
    """x rounded to the nearest value of a dtype, ties to even, still in float64: a quotient and an integer rounding."""
    if dtype == "F64":
        return x
    unit = 2 * half_ulp(x, dtype)
    return torch.round(x / unit).mul_(unit)


def ordinal(x: Tensor, dtype: str) -> Tensor:
    """Each value's place among the representable numbers of a dtype."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[TORCH[dtype].itemsize]
    bits = x.to(TORCH[dtype]).view(kind).long()
    return torch.where(bits < 0, -(bits & torch.iinfo(kind).max), bits)
