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
from .numbers import E2M1, looked_up, power, unpack

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TurnedMxfp4(Scheme):
    """Blocks of 32 inputs of each output of each expert."""

    height: int = 32
    """The rows of one expert's dense weight."""

    def decode(self, tensor: CodedTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return rows of all experts' dense weights, one below the other, in float64."""
        import torch

        pieces = []
        while start < stop:
            expert = start // self.height
            last = min(stop, (expert + 1) * self.height)
            first = expert * self.height
            pieces.append(self._of(tensor, read, expert, start - first, last - first))
            start = last
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _of(self, tensor: CodedTensor, read: PartReader, expert: int, start: int, stop: int) -> Tensor:
        """Return some rows of one expert's weight."""
        codes, scale = (_matrix(tensor.parts[role], expert) for role in ("codes", "scale"))
        begin = start - start % 2
        nibbles = unpack(read.columns(codes, begin // 2, -(-stop // 2)), 4, stop - begin)[:, start - begin :]
        first = start // 32
        exponents = power(read.columns(scale, first, -(-stop // 32))).repeat_interleave(32, dim=1)
        W = looked_up(nibbles, E2M1).mul_(exponents[:, start - 32 * first : stop - 32 * first])
        return W.T


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
