"""gpt-oss's mxfp4 experts: the input lies along the blocks, so a row of the weight is a column on disk.

    P_blocks  U8 (E, R, G, 16): 32 codes of 4 bits a block, the low nibble first
    P_scales  U8 (E, R, G): exponents

The dense P is (E, 32·G, R): P[e, 32·g + i, r] = code·2^(s − 127).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..storage.safetensors import StoredTensor
from .coded import CodedTensor, PartReader, Scheme
from .evidence import Evidence
from .numbers import E2M1, look_up, power

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TurnedMxfp4(Scheme):
    """Blocks of 32 inputs of each output of each expert."""

    height: int = 32
    """The rows of one expert's dense weight."""

    def fill(self, tensor: CodedTensor, read: PartReader, start: int, out: Tensor) -> None:
        """Fill `out` with rows of all experts' dense weights, one below the other."""
        stop = start + len(out)
        for expert in range(start // self.height, -(-stop // self.height)):
            first = max(start, expert * self.height)
            piece = out[first - start : (expert + 1) * self.height - start]
            self._fill(tensor, read, expert, first - expert * self.height, piece)

    def _fill(self, tensor: CodedTensor, read: PartReader, expert: int, start: int, out: Tensor) -> None:
        """Fill `out` with rows of one expert's weight."""
        import torch

        codes, scale = (_matrix(tensor.parts[role], expert) for role in ("codes", "scale"))
        begin, stop = start - start % 2, start + len(out)
        pairs = read.columns(codes, begin // 2, -(-stop // 2)).T.contiguous()
        nibbles = torch.stack([pairs & 15, pairs >> 4], dim=1).view(-1, out.shape[1])
        look_up(nibbles[start - begin : stop - begin], E2M1, out)
        first = start // 32
        exponents = power(read.columns(scale, first, -(-stop // 32)).T.contiguous())
        for k in range(len(exponents)):
            group = out[max(0, 32 * (first + k) - start) : 32 * (first + k + 1) - start]
            group.mul_(exponents[k])


def _matrix(part: StoredTensor, expert: int) -> StoredTensor:
    """Return one expert's rows of a part, as a matrix of bytes."""
    rows = part.shape[1]
    nbytes = part.nbytes // part.shape[0]
    return replace(part, shape=(rows, nbytes // rows), start=part.start + expert * nbytes)


def claim(found: Evidence) -> Iterator[CodedTensor]:
    """Yield the experts of gpt-oss."""
    for name, codes in found.ending("_blocks"):
        scale = found.tensors.get(f"{name}_scales")
        if not scale or codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[:3] != scale.shape:
            continue
        experts, outputs, groups, half = codes.shape
        inputs = 2 * half * groups
        if half != 16 or min(codes.shape) < 1:
            continue
        scheme = TurnedMxfp4("gpt-oss mxfp4, groups of 32", height=inputs)
        yield found.dense(name, (experts, inputs, outputs), {"codes": codes, "scale": scale}, scheme)
