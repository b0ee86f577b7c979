"""bitsandbytes: nf4 and fp4 over the flattened tensor, and int8 by rows.

    X.weight              U8 (n/2, 1), or as many bytes of another dtype; the high nibble first
    X.weight.absmax       F32, one a block of 64; U8 if it is quantised, too
    X.weight.quant_map    F32 (16,): the values of the codes
    X.weight.nested_absmax, X.weight.nested_quant_map
    X.weight.quant_state.bitsandbytes__nf4   JSON: shape, dtype, blocksize, nested_offset

    X.weight  I8 (N, K),  X.SCB  F32 (N,): W = q·SCB/127

Blocks of nf4 and fp4 do not begin anew with each row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..storage.safetensors import CONFIG_DTYPES, StoredTensor, is_possible
from ..storage.strict_header import are_counts
from .blocks import Blocks
from .coded import CodedTensor, PartReader, Scheme, as_bytes_of
from .evidence import Evidence
from .numbers import look_up_pairs, picked, scale_line, values

if TYPE_CHECKING:
    from torch import Tensor

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")


@dataclass(frozen=True)
class Nibbles(Scheme):
    """Codes of 4 bits in one line, with a scale for each block of the line."""

    block: int = 64
    nested_block: int = 256
    nested_offset: float = 0.0
    writes: ClassVar[str] = "asked"
    makes: ClassVar[tuple[str, ...]] = ("scale", "nested")

    def fill(self, tensor: CodedTensor, read: PartReader, start: int, out: Tensor) -> None:
        """Fill `out` with rows of the dense weight's matrix from `start` on."""
        first, line = start * tensor.columns, out.view(1, -1)
        last, begin = first + line.numel(), first - first % 2
        raw = _line(tensor.parts["codes"], read, begin // 2, -(-last // 2))[None]
        table = tuple(_table(tensor.parts["map"], read).tolist())
        if begin == first:
            look_up_pairs(raw, table, line, high_first=True)
        else:
            wide = line.new_empty(1, line.numel() + 1)
            look_up_pairs(raw, table, wide, high_first=True)
            line.copy_(wide[:, 1:])
        scales = self.absmax(tensor, read, first // self.block, -(-last // self.block))
        scale_line(line, first, scales, self.block)

    def absmax(self, tensor: CodedTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return the scales of blocks, decoded if they are quantised."""
        part = tensor.parts["scale"]
        raw = _line(part, read, start * part.itemsize, stop * part.itemsize)
        if "nested" not in tensor.parts:
            return values(raw, part.dtype)
        import torch

        nested = tensor.parts["nested"]
        first, last = start // self.nested_block, -(-stop // self.nested_block)
        scales = values(_line(nested, read, first * nested.itemsize, last * nested.itemsize), nested.dtype)
        block = torch.arange(start, stop, device=raw.device) // self.nested_block - first
        return picked(_table(tensor.parts["nested_map"], read), raw) * picked(scales, block) + self.nested_offset


def _line(part: StoredTensor, read: PartReader, start: int, stop: int) -> Tensor:
    """Return bytes `start` to `stop` of a part: uint8, in one line."""
    return read.rows(as_bytes_of(part, part.nbytes), start, stop).flatten()


def _table(part: StoredTensor, read: PartReader) -> Tensor:
    return values(_line(part, read, 0, part.nbytes), part.dtype)


@dataclass(frozen=True)
class Int8(Blocks):
    """Signed bytes with a scale a row; the values of a merge are written back."""

    writes: ClassVar[str] = "back"


def claim(found: Evidence) -> Iterator[CodedTensor]:
    """Yield every weight of nf4, fp4 and int8."""
    for kind in KINDS:
        for name, state in found.ending(STATE + kind):
            if tensor := _nibbles(found, name, state, kind):
                yield tensor
    for module, scale in found.ending(".SCB"):
        parts = found.present({"codes": f"{module}.weight", "format": f"{module}.weight_format"})
        codes = parts.get("codes")
        if codes and codes.dtype == "I8" and len(codes.shape) == 2:
            scheme = Int8(
                "bitsandbytes int8, one scale a row",
                grid="I8",
                height=codes.shape[0],
                columns=codes.shape[1],
                factor=1 / 127,
                balanced=True,
            )
            yield found.dense(codes.name, codes.shape, {**parts, "scale": scale}, scheme)


def _nibbles(found: Evidence, name: str, state: StoredTensor, kind: str) -> CodedTensor | None:
    """Return a weight whose state can be read and fits its parts."""
    names = {
        "codes": name,
        "scale": f"{name}.absmax",
        "map": f"{name}.quant_map",
        "nested": f"{name}.nested_absmax",
        "nested_map": f"{name}.nested_quant_map",
    }
    parts = {**found.present(names), "state": state}
    state_json, raw = None, found.bytes_of(state)
    try:
        state_json = json.loads(raw or b"")
    except (ValueError, RecursionError):
        return None
    if not isinstance(state_json, Mapping) or not {"codes", "scale", "map"} <= parts.keys():
        return None
    shape, block = state_json.get("shape"), state_json.get("blocksize")
    if not are_counts(shape) or not is_possible(shape) or not isinstance(block, int) or block < 1:
        return None
    scheme = Nibbles(
        f"bitsandbytes {kind}{', double' if 'nested' in parts else ''}",
        block=block,
        nested_block=_positive(state_json.get("nested_blocksize"), 256),
        nested_offset=float(state_json.get("nested_offset") or 0.0),
    )
    said = {text: dtype for dtype, text in CONFIG_DTYPES.items()}.get(str(state_json.get("dtype")), "")
    return found.dense(name, tuple(shape), parts, scheme, said)


def _positive(value: Any, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default
