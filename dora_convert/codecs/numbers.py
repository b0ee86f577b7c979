"""Turn bytes into numbers: packed integers, small floats, powers of two. Everything comes out as float64."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the 4-bit float of mxfp4 and nvfp4, by code."""

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip
"""torch's names of the dtypes that parts have."""


def unpack(raw: Tensor, bits: int, count: int) -> Tensor:
    """Return unsigned integers of some bits that lie in rows of bytes without gaps, the low bits first.

    `raw` is uint8 (rows, bytes); the result has (rows, count), as uint8.
    """
    import torch

    if bits == 8:
        return raw[:, :count]
    if 8 % bits == 0:
        parts = [raw >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(1)[:, :count]
    first = torch.arange(count, device=raw.device) * bits
    wide = torch.nn.functional.pad(raw, (0, 1)).to(torch.int32)
    pair = wide[:, first // 8] | wide[:, first // 8 + 1] << 8
    return (pair >> first % 8 & (1 << bits) - 1).to(torch.uint8)


def values(raw: Tensor, dtype: str) -> Tensor:
    """Return bytes of a stored dtype as float64; exponents (F8_E8M0) as powers of two."""
    import torch

    if dtype == "F8_E8M0":
        return power(raw)
    if dtype in ("F8_E4M3", "F8_E5M2"):  # a table is several times faster than a conversion
        return picked(_bytes_as(dtype, raw.device), raw)
    return raw.contiguous().view(getattr(torch, TORCH_NAMES[dtype])).to(torch.float64)


def power(raw: Tensor) -> Tensor:
    """Return 2^(b − 127) for bytes b; 255 is NaN."""
    import torch

    bits = raw.to(torch.int64).add_(1023 - 127) << 52  # float64's own exponent
    return bits.view(torch.float64).masked_fill(raw == 255, torch.nan)


def looked_up(codes: Tensor, table: tuple[float, ...]) -> Tensor:
    """Return a table's values for codes, in float64."""
    return picked(_table(table, codes.device), codes)


def pairs(raw: Tensor, table: tuple[float, ...], *, high_first: bool = False) -> Tensor:
    """Return a table's values for codes of 4 bits, two in a byte: float64 (rows, 2 · bytes).

    One look-up gives both values of a byte, as a complex number: half the work of a look-up for each.
    """
    import torch

    both = _pairs(table, high_first, raw.device).index_select(0, raw.flatten().int())
    return torch.view_as_real(both).view(len(raw), -1)


@cache
def _pairs(values: tuple[float, ...], high_first: bool, device: torch.device) -> Tensor:  # noqa: FBT001 - for the cache
    """Return the two values of every byte as complex numbers."""
    import torch

    low, high = torch.tensor(values, dtype=torch.float64, device=device).view(-1)[_nibbles(device)]
    return torch.complex(high, low) if high_first else torch.complex(low, high)


def _nibbles(device: torch.device) -> Tensor:
    """Return the low and the high 4 bits of every byte: (2, 256)."""
    import torch

    every = torch.arange(256, device=device)
    return torch.stack([every & 15, every >> 4])


def picked(table: Tensor, codes: Tensor) -> Tensor:
    """Return the entries of a table that codes stand for."""
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


@cache
def _bytes_as(dtype: str, device: torch.device) -> Tensor:
    """Return the values of all bytes of a dtype."""
    import torch

    every = torch.arange(256, dtype=torch.uint8, device=device)
    return every.view(getattr(torch, TORCH_NAMES[dtype])).to(torch.float64)


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float64, device=device)


def spread(scale: Tensor, columns: int, group: int) -> Tensor:
    """Return one number for each column from one for each group of columns: (rows, columns)."""
    if scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(group, dim=1)[:, :columns]


def grouped(W: Tensor, numbers: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return views of W and of one number for each group of columns that broadcast: no number is copied if possible."""
    rows, columns = W.shape
    if numbers.shape[1] > 1 and numbers.shape[1] * group == columns:
        return W.view(rows, -1, group), numbers.unsqueeze(2)
    return W, spread(numbers, columns, group)
