"""compressed-tensors, as llm-compressor writes it and vLLM reads it.

    X.weight         F8_E4M3 or I8 (N, K)       float-, int- and naive-quantized, mxfp8
    X.weight_packed  I32 (N, K·bits/32)         pack-quantized: unsigned, less half their range, low bits first
                     U8 (N, K/2)                nvfp4 and mxfp4, the low nibble first
    X.weight_scale   a number, (N, 1), (N, K/group) or a grid; F8_E4M3 for nvfp4, U8 exponents for mxfp4
    X.weight_zero_point, X.weight_g_idx, X.weight_global_scale (which divides), X.weight_shape

`config_groups` says bits and blocks, and whom they are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..storage.safetensors import StoredTensor
from .blocks import Blocks
from .coded import CodedTensor
from .evidence import Evidence, matches, numbers
from .fp8 import title_of

METHOD = "compressed-tensors"
UNREAD = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24", "mxfp6-pack-quantized")
"""Formats that are not read."""


@dataclass(frozen=True)
class Compressed(Blocks):
    """8-bit codes; the values of a merge are written back."""

    writes: ClassVar[str] = "back"


@dataclass(frozen=True)
class Packed(Blocks):
    """Packed codes, which are written again only if the caller asks for it."""

    writes: ClassVar[str] = "asked"


def claim(found: Evidence) -> Iterator[CodedTensor]:
    """Yield every compressed weight."""
    said = found.method(METHOD) or next((one for one in found.methods if "config_groups" in one), None)
    if said is None or said.get("format") in UNREAD or _is_sparse(said):
        return
    for module, scale in found.ending(".weight_scale"):
        args = _arguments(said, module)
        names = {
            "zero": f"{module}.weight_zero_point",
            "global": f"{module}.weight_global_scale",
            "index": f"{module}.weight_g_idx",
            "shape": f"{module}.weight_shape",
        }
        parts = {"scale": scale, **found.present(names), **found.of_inputs(module)}
        if packed := found.tensors.get(f"{module}.weight_packed"):
            yield _packed(found, module, {"codes": packed, **parts}, args)
        elif (codes := found.tensors.get(f"{module}.weight")) and codes.dtype in ("F8_E4M3", "I8"):
            yield _plain(found, {"codes": codes, **parts}, args)


def _is_sparse(said: Mapping[str, Any]) -> bool:
    sparsity = said.get("sparsity_config")
    return isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense"


def _arguments(said: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Return the arguments of a module's weights; those of whole classes count last."""
    groups = said.get("config_groups")
    chosen: Mapping[str, Any] = {}
    for group in groups.values() if isinstance(groups, Mapping) else ():
        targets, weights = group.get("targets") or (), group.get("weights")
        if isinstance(weights, Mapping) and any(matches(module, str(target)) for target in targets):
            return {**weights, "format": group.get("format") or said.get("format")}
        if isinstance(weights, Mapping) and not chosen:
            chosen = {**weights, "format": group.get("format") or said.get("format")}
    return chosen


def _plain(found: Evidence, parts: dict[str, StoredTensor], args: Mapping[str, Any]) -> CodedTensor:
    """Return a weight of one byte an element."""
    codes, scale = parts["codes"], parts["scale"]
    rows, columns = numbers(codes.shape, scale, args.get("block_structure"))
    kind = "fp8" if codes.dtype == "F8_E4M3" else "int8"
    scheme = Compressed(
        title_of(f"compressed-tensors {kind}", codes.shape, rows, columns),
        grid=codes.dtype,
        height=codes.shape[-2],
        rows=rows,
        columns=columns,
        scale_bytes="F8_E8M0",
    )
    return found.dense(codes.name, codes.shape, parts, scheme)


def _packed(found: Evidence, module: str, parts: dict[str, StoredTensor], args: Mapping[str, Any]) -> CodedTensor:
    """Return a weight of several codes a word."""
    codes, scale = parts["codes"], parts["scale"]
    nibbles = codes.dtype == "U8"
    bits = 4 if nibbles else int(args.get("num_bits") or 4)
    shape = _shape(found, codes, parts.get("shape")) or _width(codes, scale, bits, args)
    rows, columns = numbers(shape, scale)
    if rows == 1 and int(args.get("group_size") or 0) > 0 and columns < shape[-1]:
        columns = int(args["group_size"])
    name = ("mxfp4" if scale.dtype == "U8" else "nvfp4") if nibbles else f"int{bits}"
    scheme = Packed(
        title_of(f"compressed-tensors {name}", shape, rows, columns),
        grid="E2M1" if nibbles else "signed",
        bits=bits,
        height=shape[-2],
        rows=rows,
        columns=columns,
        scale_bytes="F8_E8M0",
        divides=True,
        packed_zeros=True,
    )
    return found.dense(f"{module}.weight", shape, parts, scheme)


def _shape(found: Evidence, codes: StoredTensor, part: StoredTensor | None) -> tuple[int, ...] | None:
    """Return the shape that a part holds, if the part is on this machine and fits the codes."""
    raw = found.bytes_of(part) if part else None
    if not part or raw is None or part.dtype not in ("I64", "I32"):
        return None
    size = part.itemsize
    shape = tuple(int.from_bytes(raw[k : k + size], "little", signed=True) for k in range(0, len(raw), size))
    return shape if len(shape) >= 2 and min(shape) > 0 and shape[:-1] == codes.shape[:-1] else None


def _width(codes: StoredTensor, scale: StoredTensor, bits: int, args: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the dense shape from the headers alone."""
    widest = codes.shape[-1] * codes.itemsize * 8 // bits
    group = int(args.get("group_size") or 0)
    columns = scale.shape[-1] * group if group > 0 and len(scale.shape) > 1 else widest
    return (*codes.shape[:-1], min(columns, widest))
