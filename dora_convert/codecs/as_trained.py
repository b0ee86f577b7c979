"""Show a 16-bit base as a QLoRA training saw it: quantised and decoded again, by bitsandbytes' own rule.

bitsandbytes quantises when a model is loaded, so the base on disk has no codes. The codes are made here by
bitsandbytes itself, for a whole tensor at once: double quantisation takes the mean over all of a tensor's scales.
Values are decoded in float64. bitsandbytes skips embeddings and the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .coded import CodedTensor, PartReader, Scheme, as_bytes_of
from .numbers import pick, scale_line

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("nf4", "nf4-double", "fp4", "int8")
BLOCK = 64
"""Elements that share a scale in 4 bits."""


class MadeCodes(NamedTuple):
    """The codes of a whole weight."""

    codes: Tensor  # by rows for int8, else in one line
    scales: Tensor  # float64
    table: Tensor | None = None  # the values of codes of 4 bits


@dataclass(frozen=True)
class AsTrained(Scheme):
    """A dense weight that is quantised as it is read."""

    kind: str = "nf4"

    def whole(self, tensor: CodedTensor) -> int:
        """Return the bytes held for the whole weight: it, its codes, and the tool's copies."""
        return 8 * tensor.numel

    def fill(self, tensor: CodedTensor, read: PartReader, start: int, out: Tensor) -> None:
        """Fill `out` with rows of the weight: code·scale."""
        made, stop = self.made(tensor, read), start + len(out)
        first, last = start * tensor.columns, stop * tensor.columns
        if made.table is None:
            out.copy_(made.codes[start:stop]).mul_((made.scales[start:stop] / 127)[:, None])
            return
        pick(made.table, made.codes[first:last], out)
        scale_line(out.view(1, -1), first, made.scales[first // BLOCK : -(-last // BLOCK)], BLOCK)

    def made(self, tensor: CodedTensor, read: PartReader) -> MadeCodes:
        """Return the codes of the whole weight, made now or kept from before."""
        key = (tensor.path, tensor.start)
        held: MadeCodes | None = read.held.get(key)
        if held is None:
            read.held.clear()
            part = tensor.parts["codes"]
            raw = read.rows(as_bytes_of(part, part.shape[0]), 0, part.shape[0])
            held = read.held[key] = make_codes(raw, part.dtype, self.kind)
        return held


def make_codes(raw: Tensor, dtype: str, kind: str) -> MadeCodes:
    """Return the codes that bitsandbytes makes of a weight's bytes (rows, bytes of a row)."""
    import torch
    from bitsandbytes import functional

    from .numbers import TORCH_NAMES

    W = raw.contiguous().view(getattr(torch, TORCH_NAMES[dtype]))
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(W.half())
        return MadeCodes(codes, scales.double().flatten())
    packed, state = functional.quantize_4bit(
        (W.float() if dtype == "F64" else W).reshape(1, -1),
        blocksize=BLOCK,
        compress_statistics=kind.endswith("-double"),
        quant_type=kind.removesuffix("-double"),
    )
    bits = packed.flatten().view(torch.uint8)
    codes = torch.stack([bits >> 4, bits & 15], dim=-1).flatten()[: W.numel()]
    table = state.code.to(bits.device).double()
    if not kind.endswith("-double"):
        return MadeCodes(codes, state.absmax.double(), table)
    inner = state.state2
    block = torch.arange(len(state.absmax), device=bits.device) // inner.blocksize
    scales = inner.code.to(bits.device).double()[state.absmax.long()] * inner.absmax.double()[block]
    return MadeCodes(codes, scales + float(state.offset), table)
