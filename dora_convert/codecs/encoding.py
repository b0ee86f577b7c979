"""Code values again, in the layout that they were decoded from: numbers for each block, and a code for each value.

A block keeps its numbers as long as its values fit them. Else it gets new ones from its largest values, by the rule
of its kind. Codes are rounded to nearest, ties to even, from float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .blocks import Blocks
from .codes import packed, to_e2m1, to_float8
from .numbers import TORCH_NAMES, by_groups, power, row_pieces, values

if TYPE_CHECKING:
    from torch import Tensor

TOPS = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0, "E2M1": 6.0}
"""The largest value of each grid of floats."""
REACH = {"E2M1": 7 / 6}
"""Times the largest value of a grid, what still is within half a step of it."""
EPSILON = 1e-7
"""The least scale of MLX."""


def code_range(scheme: Blocks) -> tuple[int, int]:
    """Return the least and the largest code of a grid of integers."""
    if scheme.grid == "unsigned":
        return 0, (1 << scheme.bits) - 1
    half = 1 << scheme.bits - 1
    return (1 - half if scheme.balanced else -half), half - 1


def extremes(scheme: Blocks, x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of each block of some rows: (blocks of rows, groups of columns).

    All rows are of one block, unless each has its own scales. `index` holds each column's group, where groups are
    not neighbours. Without it, cut-off blocks count as if they went on with zeros.
    """
    import torch

    if index is not None:
        low = x.new_zeros(len(x), int(index.max()) + 1)
        where = index.expand_as(x)
        return low.scatter_reduce(1, where, x, "amin"), low.scatter_reduce(1, where, x, "amax")
    rows, columns = 1 if scheme.rows == 1 else len(x), min(scheme.columns, x.shape[1])
    down, across = -(-len(x) // rows), -(-x.shape[1] // columns)
    if (down * rows, across * columns) != tuple(x.shape):
        x = torch.nn.functional.pad(x, (0, across * columns - x.shape[1], 0, down * rows - len(x)))
    blocks = x.view(down, rows, across, columns)
    return blocks.amin(3).amin(1), blocks.amax(3).amax(1)  # one dimension after the other is several times faster


def settle(
    scheme: Blocks, old: Mapping[str, Tensor], low: Tensor, high: Tensor, dtypes: Mapping[str, str], *, fresh: bool
) -> dict[str, Tensor]:
    """Return the numbers of blocks by role, as they are stored, from their values' extremes.

    `old` holds the stored numbers in float64, `dtypes` the dtypes of those that may change. With `fresh`, no block
    keeps its numbers.
    """
    import torch

    new = _fresh(scheme, old, low, high)
    new = {role: rounded(number, dtypes[role], scheme) for role, number in new.items()}
    if "zero" in new:  # from the scale as it is stored
        least, most = code_range(scheme)
        new["zero"] = (least - low.clamp(max=0) / scale_of(scheme, new)).round().clamp(least, most)
    keep = (high == 0) & (low == 0) if fresh else _fits(scheme, old, low, high)
    return {role: torch.where(keep, old[role], number) for role, number in new.items()}


def _fits(scheme: Blocks, old: Mapping[str, Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return True for blocks whose values fit their old numbers."""
    scale = scale_of(scheme, old)
    if top := TOPS.get(scheme.grid):
        return (-low).maximum(high) <= top * scale
    least, most = code_range(scheme)
    ends = [_codes_of(end, scale, old) for end in (low, high)]
    return (ends[0].minimum(ends[1]) >= least) & (ends[0].maximum(ends[1]) <= most)


def _codes_of(x: Tensor, scale: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """Return the integer codes of values, not cut to any range."""
    codes = ((x - numbers["bias"]).div_(scale) if "bias" in numbers else x / scale).round_()
    return codes + numbers["zero"] if "zero" in numbers else codes


def _fresh(scheme: Blocks, old: Mapping[str, Tensor], low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """Return new numbers, not rounded yet, by the rule of the kind."""
    import torch

    unit = scale_of(scheme, {**old, "scale": torch.ones_like(old["scale"])})
    largest = (-low).maximum(high)
    if top := TOPS.get(scheme.grid):
        return {"scale": largest / top / unit}
    least, most = code_range(scheme)
    if "bias" in old:
        return _mlx(low, high, most)
    if "zero" in old and old["zero"].any():
        return {"scale": (high.clamp(min=0) - low.clamp(max=0)) / (most - least) / unit, "zero": old["zero"]}
    return {"scale": largest / ((most - least) / 2) / unit}


def _mlx(low: Tensor, high: Tensor, most: int) -> dict[str, Tensor]:
    """Return MLX's scale and bias: the end that is farther from zero has a code of its own, and so has zero."""
    import torch

    scale = ((high - low) / most).clamp(min=EPSILON)
    below = low.abs() > high.abs()
    scale, edge = torch.where(below, scale, -scale), torch.where(below, low, high)
    code = (edge / scale).round()
    return {
        "scale": torch.where(code == 0, scale, edge / code),
        "bias": torch.where(code == 0, torch.zeros_like(edge), edge),
    }


def rounded(numbers: Tensor, dtype: str, scheme: Blocks) -> Tensor:
    """Return numbers as a dtype stores them, in float64; exponents are rounded up.

    A number is Inf if the dtype does not hold it.
    """
    import torch

    dtype = scheme.meant(dtype)
    if dtype == "F8_E8M0":
        mantissa, exponent = torch.frexp(numbers)
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
        return power((exponent.clamp(-127, 127) + 127).to(torch.uint8)).masked_fill_(exponent > 127, torch.inf)
    if dtype in ("F8_E4M3", "F8_E5M2"):
        top = TOPS[dtype]
        reach = top * REACH.get(scheme.grid, 1 + 2.0**-6)  # rounds to the top itself
        return to_float8(numbers.clamp(max=top), dtype).double().masked_fill_(numbers > reach, torch.inf)
    return numbers.to(getattr(torch, TORCH_NAMES[dtype])).double()


def stored(numbers: Tensor, dtype: str, scheme: Blocks) -> Tensor:
    """Return the bytes of numbers that a dtype holds: uint8 (rows, bytes)."""
    import torch

    dtype = scheme.meant(dtype)
    if dtype == "F8_E8M0":
        return (torch.frexp(numbers)[1] + 126).to(torch.uint8)
    kind = getattr(torch, TORCH_NAMES[dtype])
    return numbers.to(kind).contiguous().view(torch.uint8).view(len(numbers), -1)


def scale_of(scheme: Blocks, numbers: Mapping[str, Tensor]) -> Tensor:
    """Return the scales that values are divided by, from stored numbers."""
    scale = numbers["scale"] * scheme.factor
    if "global" in numbers:
        scale = scale / numbers["global"] if scheme.divides else scale * numbers["global"]
    return scale


def encode(scheme: Blocks, x: Tensor, numbers: Mapping[str, Tensor], index: Tensor | None, row_bytes: int) -> Tensor:
    """Return the codes of rows as bytes: uint8 (rows, row_bytes); x is overwritten.

    `numbers` are as stored: a row for each of x, or one for all.
    """
    import torch

    scale = scale_of(scheme, numbers)

    def apply(number: Tensor, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        if index is None or number.shape[1] == 1:
            by_groups(x, number, scheme.columns, how)
            return
        for rows in row_pieces(x):
            how(x[rows], (number if len(number) == 1 else number[rows]).index_select(1, index))

    top = TOPS.get(scheme.grid)
    if "bias" in numbers:
        apply(numbers["bias"], torch.Tensor.sub_)
    apply(scale, torch.Tensor.div_)
    if not top:
        x.round_()
        if "zero" in numbers:
            apply(numbers["zero"], torch.Tensor.add_)
    if bool((scale == 0).any()):
        x.nan_to_num_(0.0)
    least, most = (-top, top) if top else code_range(scheme)
    codes = _bytes_of(scheme, x.clamp_(least, most))
    bits = scheme.bits if scheme.grid in ("signed", "unsigned", "E2M1") else 8
    return packed(codes, bits, row_bytes)


def _bytes_of(scheme: Blocks, q: Tensor) -> Tensor:
    """Return a byte for each value of the grid: uint8, of its shape."""
    import torch

    if scheme.grid == "E2M1":
        return torch.cat([to_e2m1(q[rows]) for rows in row_pieces(q)])
    if scheme.grid in TOPS:
        return to_float8(q, scheme.grid).view(torch.uint8)
    middle = 1 << scheme.bits - 1 if scheme.grid == "signed" else 0
    return q.to(torch.int16).add_(middle).to(torch.uint8)  # float64 to uint8 takes four times as long


def numbers_of(raw: Tensor, dtype: str, scheme: Blocks) -> Tensor:
    """Return stored numbers of blocks in float64."""
    return values(raw, scheme.meant(dtype))
