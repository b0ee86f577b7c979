"""fp8 with scales for blocks, rows or the whole tensor: DeepSeek, Qwen, Mistral, modelopt and others.

    X.weight            F8_E4M3 or F8_E5M2 (N, K)
                        or I8 (N, K/2): two 4-bit floats a byte, low bits first (DeepSeek V4's experts)
    X.weight_scale_inv  F32, BF16, F8_E8M0 or U8 (exponents): a grid, one for each row, or one number

Despite its name the scale multiplies. `weight_block_size` in the config says how large blocks are: the grid
alone does not, where the last blocks are cut off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .blocks import Blocks
from .coded import CodedTensor
from .evidence import Evidence, numbers

FLOATS = ("F8_E4M3", "F8_E5M2")
SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""The last names of the scales of X.weight."""
OTHERS = ("compressed-tensors", "torchao")
"""Methods with files of their own here."""


@dataclass(frozen=True)
class Fp8(Blocks):
    """fp8 codes; the values of a merge are written back."""

    writes: ClassVar[str] = "back"


@dataclass(frozen=True)
class Fp4InBytes(Blocks):
    """Codes of 4-bit floats, two in an int8."""

    writes: ClassVar[str] = "asked"


def claim(found: Evidence) -> Iterator[CodedTensor]:
    """Yield every fp8 weight that has scales."""
    if found.method(*OTHERS):
        return
    kinds = (*FLOATS, "I8") if found.method("fp8") else FLOATS
    block = next((one["weight_block_size"] for one in found.methods if one.get("weight_block_size")), None)
    for name, codes in found.tensors.items():
        if codes.dtype not in kinds or len(codes.shape) not in (2, 3):
            continue
        module = name.removesuffix(".weight")
        names = [f"{module}.{last}" for last in SCALES] if module != name else [f"{name}_scale_inv", f"{name}_scale"]
        scale = next((found.tensors[each] for each in names if each in found.tensors), None)
        if not scale:
            continue
        shape = codes.shape if codes.dtype in FLOATS else (*codes.shape[:-1], 2 * codes.shape[-1])
        rows, columns = numbers(shape, scale, block)
        title = title_of("fp8" if codes.dtype in FLOATS else "fp4 in int8", shape, rows, columns)
        kind, grid, bits = (Fp8, codes.dtype, 8) if codes.dtype in FLOATS else (Fp4InBytes, "E2M1", 4)
        scheme = kind(title, grid=grid, bits=bits, height=shape[-2], rows=rows, columns=columns, scale_bytes="F8_E8M0")
        yield found.dense(name, shape, {"codes": codes, "scale": scale, **found.of_inputs(module)}, scheme)


def title_of(kind: str, shape: tuple[int, ...], rows: int, columns: int) -> str:
    """Return a kind with what shares a scale, for reports."""
    if columns >= shape[-1]:
        return f"{kind}, one scale a {'tensor' if rows >= shape[-2] else 'row'}"
    return f"{kind}, {'groups' if rows == 1 else 'blocks'} of {columns if rows == 1 else f'{rows} × {columns}'}"
