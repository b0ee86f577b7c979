"""MLX's quantisation, which embeddings and heads have, too.

    X.weight  U32 (N, K·bits/32), unsigned codes of 2 to 8 bits without gaps, the low bits first
    X.scales  (N, K/group); U8 exponents for mxfp4 and mxfp8, U8 fp8 codes for nvfp4
    X.biases  (N, K/group), for affine codes: W = q·s + b

`quantization` in the config says bits and group size, for single modules, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .blocks import Blocks
from .coded import CodedTensor
from .evidence import Evidence

FLOAT_MODES = {"mxfp4": ("E2M1", 4, 32), "mxfp8": ("F8_E4M3", 8, 32), "nvfp4": ("E2M1", 4, 16)}
"""The grid, bits and group size of codes that are small floats."""

SCALES = {"mxfp4": "F8_E8M0", "mxfp8": "F8_E8M0", "nvfp4": "F8_E4M3"}
"""The dtype of their scales, which are stored as bytes."""


@dataclass(frozen=True)
class MlxBytes(Blocks):
    """Affine codes of 8 bits; the values of a merge are written back."""

    writes: ClassVar[str] = "back"


@dataclass(frozen=True)
class MlxPacked(Blocks):
    """Codes of fewer bits, which are written again only if the caller asks for it."""

    writes: ClassVar[str] = "asked"


def claim(found: Evidence) -> Iterator[CodedTensor]:
    """Yield every weight of 32-bit words with scales."""
    said: Mapping[str, Any] = next((one for one in found.methods if "bits" in one and "group_size" in one), {})
    for module, scales in found.ending(".scales"):
        codes, biases = found.tensors.get(f"{module}.weight"), found.tensors.get(f"{module}.biases")
        if not codes or codes.dtype != "U32" or len(codes.shape) < 2 or not scales.shape:
            continue
        own = said.get(module)
        args = {**said, **own} if isinstance(own, Mapping) else said
        parts = {"codes": codes, "scale": scales} | ({"bias": biases} if biases else {})
        mode = str(args.get("mode") or "affine")
        if biases is None and mode not in FLOAT_MODES:
            mode = "mxfp4"
        yield _weight(found, parts, args, "affine" if biases else mode)


def _weight(found: Evidence, parts: dict[str, Any], args: Mapping[str, Any], mode: str) -> CodedTensor:
    """Return one weight; the shapes of codes and scales decide if the config's numbers do not fit them."""
    codes, scales = parts["codes"], parts["scale"]
    grid, bits, group = FLOAT_MODES.get(mode, ("unsigned", int(args.get("bits", 4)), int(args.get("group_size", 64))))
    groups = scales.shape[-1]
    if codes.shape[-1] * 32 != bits * group * groups and mode not in FLOAT_MODES:
        group, bits = next(
            (each, codes.shape[-1] * 32 // (each * groups))
            for each in (group, 64, 32, 128)
            if codes.shape[-1] * 32 % (each * groups) == 0
        )
    shape = (*codes.shape[:-1], codes.shape[-1] * 32 // bits)
    kind = MlxBytes if bits == 8 and mode == "affine" else MlxPacked
    scheme = kind(
        f"MLX {mode if mode in FLOAT_MODES else f'{bits} bits'}, groups of {group}",
        grid=grid,
        bits=bits,
        height=shape[-2],
        columns=group,
        scale_bytes=SCALES.get(mode),
    )
    return found.dense(codes.name, shape, parts, scheme)
