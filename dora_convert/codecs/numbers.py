"""Turn bytes into numbers: packed integers, small floats, powers of two. Everything comes out as float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the 4-bit float of mxfp4 and nvfp4, by code."""

FLOATS8 = ("F8_E4M3", "F8_E5M2")
"""The dtypes of floats of 8 bits."""

PIECE_ELEMENTS = 1 << 17
"""Elements that are computed together where steps need memory for each element."""

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
    if dtype in FLOATS8:  # a table is several times faster than a conversion
        return picked(table_of(dtype, raw.device), raw)
    return raw.contiguous().view(getattr(torch, TORCH_NAMES[dtype])).to(torch.float64)


def power(raw: Tensor) -> Tensor:
    """Return 2^(b − 127) for bytes b; 255 is NaN."""
    import torch

    bits = raw.to(torch.int64).add_(1023 - 127) << 52  # float64's own exponent
    return bits.view(torch.float64).masked_fill(raw == 255, torch.nan)


def look_up(codes: Tensor, table: tuple[float, ...], out: Tensor) -> None:
    """Fill contiguous float64 with a table's values for codes."""
    pick(_table(table, codes.device), codes, out)


def pick(table: Tensor, codes: Tensor, out: Tensor) -> None:
    """Fill contiguous memory with the entries of a table that codes stand for."""
    import torch

    torch.index_select(table, 0, codes.flatten().int(), out=out.view(-1))


def look_up_pairs(raw: Tensor, table: tuple[float, ...], out: Tensor, *, high_first: bool = False) -> None:
    """Fill float64 (rows, columns) with a table's values for codes of 4 bits, two in a byte of `raw` (rows, bytes).

    One look-up gives both values of a byte, as a complex number: half the work of a look-up for each.
    """
    import torch

    both = _pairs(table, high_first, raw.device)
    if out.numel() == 2 * raw.numel() and out.storage_offset() % 2 == 0:
        pick(both, raw, torch.view_as_complex(out.view(-1, 2)))
    else:  # the last byte of a row is cut off
        out.copy_(torch.view_as_real(picked(both, raw)).view(len(raw), -1)[:, : out.shape[1]])


@cache
def _pairs(values: tuple[float, ...], high_first: bool, device: torch.device) -> Tensor:  # noqa: FBT001 - for the cache
    """Return the two values of every byte as complex numbers."""
    import torch

    low, high = torch.tensor(values, dtype=torch.float64, device=device).view(-1)[_nibbles(device)]
    return torch.complex(high, low) if high_first else torch.complex(low, high)


def nibbles(raw: Tensor) -> Tensor:
    """Return codes of 4 bits, two in a byte, the low ones first: int32 (rows, 2 · bytes)."""
    import torch

    return picked(_two_numbers(raw.device), raw).view(torch.int32)


@cache
def _two_numbers(device: torch.device) -> Tensor:
    """Return the two int32 codes of every byte, as one int64."""
    import torch

    return _nibbles(device).T.to(torch.int32).contiguous().view(torch.int64).flatten()


def _nibbles(device: torch.device) -> Tensor:
    """Return the low and the high 4 bits of every byte: (2, 256)."""
    import torch

    every = torch.arange(256, device=device)
    return torch.stack([every & 15, every >> 4])


def picked(table: Tensor, codes: Tensor) -> Tensor:
    """Return the entries of a table that codes stand for."""
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


@cache
def table_of(dtype: str, device: torch.device) -> Tensor:
    """Return the values of all bytes of a dtype."""
    import torch

    every = torch.arange(256, dtype=torch.uint8, device=device)
    return every.view(getattr(torch, TORCH_NAMES[dtype])).to(torch.float64)


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float64, device=device)


def by_groups(W: Tensor, numbers: Tensor, group: int, apply: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Apply an operation in place to W (rows, columns) and to one number for each group of columns, or for each row.

    Numbers broadcast and are not copied. The last group may be cut off.
    """
    columns = W.shape[1]
    if numbers.shape[1] == 1:
        apply(W, numbers)
        return
    whole = columns // group * group
    if whole:
        apply(W[:, :whole].view(len(W), -1, group), numbers[:, : whole // group].unsqueeze(2))
    if whole < columns:
        apply(W[:, whole:], numbers[:, whole // group, None])


def scale_line(line: Tensor, first: int, scales: Tensor, block: int) -> None:
    """Multiply a line, (1, n), by one number for each block, in place; `first` is the number of its first element."""
    skipped = min(-first % block, line.shape[1])
    if skipped:  # the rest of a block that began before
        line[:, :skipped].mul_(scales[0])
        scales = scales[1:]
    if line.shape[1] > skipped:
        by_groups(line[:, skipped:], scales[None], block, type(line).mul_)


def row_pieces(W: Tensor) -> Iterator[slice]:
    """Yield runs of rows of W, where steps need memory for each element."""
    height = max(1, PIECE_ELEMENTS // max(1, W.shape[1]))
    for first in range(0, len(W), height):
        yield slice(first, first + height)
