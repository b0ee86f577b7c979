"""NVIDIA modelopt's nvfp4; its fp8 is like everybody's.

    X.weight          U8 (N, K/2), the low nibble first
    X.weight_scale    F8_E4M3 (N, K/16)
    X.weight_scale_2  F32, one number, which multiplies

All codes are the 4-bit float's (E2M1).
"""

from __future__ import annotations

from collections.abc import Iterator

from .coded import CodedTensor
from .compressed import Packed
from .evidence import Evidence


def claim(found: Evidence) -> Iterator[CodedTensor]:
    """Yield every weight with two scales."""
    for module, overall in found.ending(".weight_scale_2"):
        parts = found.present({"codes": f"{module}.weight", "scale": f"{module}.weight_scale"})
        codes, scale = parts.get("codes"), parts.get("scale")
        if not (codes and scale and codes.dtype == "U8" and scale.dtype == "F8_E4M3"):
            continue
        shape = (*codes.shape[:-1], 2 * codes.shape[-1])
        scheme = Packed(
            "modelopt nvfp4, groups of 16", grid="E2M1", bits=4, height=shape[-2], columns=shape[-1] // scale.shape[-1]
        )
        yield found.dense(codes.name, shape, {**parts, "global": overall, **found.of_inputs(module)}, scheme)
