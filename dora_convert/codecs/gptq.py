"""GPTQ: the input lies along the words, so a row of the weight is a column on disk.

    X.qweight  I32 (K·bits/32, N), low bits first along K
    X.qzeros   I32 (K/group, N·bits/32), low bits first along N: z − 1 for "gptq", z for "gptq_v2"
    X.scales   F16 (K/group, N)
    X.g_idx    I32 (K,): the group of each input, if the order was chosen by activations

    W[n, k] = s[g(k), n]·(q[k, n] − z[g(k), n])

Calibration chose the codes, so they are never made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .coded import CodedTensor, PartReader, Scheme, as_bytes_of, as_matrix
from .evidence import Evidence
from .numbers import grouped, pairs, unpack, values

if TYPE_CHECKING:
    from torch import Tensor

FOUR_BITS = tuple(map(float, range(16)))
METHODS = ("gptq", "auto-round", "auto_round", "autoround")


@dataclass(frozen=True)
class Gptq(Scheme):
    """Words along the input, scales and zero points by groups of inputs."""

    bits: int = 4
    group: int = 128
    zero: int = 1
    """The number that is added to stored zero points."""

    def decode(self, tensor: CodedTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return rows of the dense weight's matrix in float64; most are computed in columns as they lie on disk."""
        import torch

        parts, columns = tensor.parts, tensor.columns
        words = read.columns(as_matrix(parts["codes"]), 4 * start, 4 * stop).view(torch.int32)
        first = start // 32 * 32  # 32 codes fill whole words
        stream = read.columns(as_matrix(parts["zero"]), first * self.bits // 8, -(-stop * self.bits // 32) * 4)
        zeros = unpack(stream, self.bits, stop - first)[:, start - first :].double() + self.zero
        part = parts["scale"]
        scale = values(read.columns(as_matrix(part), start * part.itemsize, stop * part.itemsize), part.dtype)
        if "index" in parts:
            group = values(read.rows(as_bytes_of(parts["index"], 1), 0, 1), parts["index"].dtype).int().flatten()
            if not torch.equal(group, torch.arange(columns, dtype=torch.int32, device=group.device) // self.group):
                W = self._codes(words, columns).sub_(zeros.index_select(0, group))
                return W.mul_(scale.index_select(0, group)).T
        if self.bits == 4:
            W = pairs(words.T.contiguous().view(torch.uint8), FOUR_BITS)
            view, numbers = grouped(W, zeros.T, self.group)
            view.sub_(numbers)
            view, numbers = grouped(W, scale.T, self.group)
            view.mul_(numbers)
            return W
        W = self._codes(words, columns)
        if len(zeros) * self.group == columns:
            blocks = W.view(len(zeros), self.group, -1)
            blocks.sub_(zeros.unsqueeze(1)).mul_(scale.unsqueeze(1))
            return W.T
        zeros, scale = (each.repeat_interleave(self.group, dim=0)[:columns] for each in (zeros, scale))
        return W.sub_(zeros).mul_(scale).T

    def _codes(self, words: Tensor, columns: int) -> Tensor:
        """Return the codes of columns of words: float64 (columns of the weight, columns of words)."""
        import torch

        if 32 % self.bits:  # codes lie in two words
            return unpack(words.T.contiguous().view(torch.uint8), self.bits, columns).T.double().contiguous()
        each = 32 // self.bits
        codes = torch.empty((len(words), each, words.shape[1]), dtype=torch.float64, device=words.device)
        for place in range(each):
            codes[:, place] = words >> self.bits * place & (1 << self.bits) - 1
        return codes.view(-1, words.shape[1])[:columns]


def claim(found: Evidence) -> Iterator[CodedTensor]:
    """Yield every GPTQ weight."""
    said = found.method(*METHODS)
    if said is None or "awq" in str(said.get("packing_format", "")):
        return
    later = "v2" in str(said.get("checkpoint_format", ""))
    for module, codes in found.ending(".qweight"):
        names = {"zero": f"{module}.qzeros", "scale": f"{module}.scales", "index": f"{module}.g_idx"}
        parts = {"codes": codes, **found.present(names)}
        bits = int(said.get("bits") or 4)
        if not {"zero", "scale"} <= parts.keys() or codes.dtype != "I32" or len(codes.shape) != 2 or bits > 8:
            continue
        columns, groups = codes.shape[0] * 32 // bits, parts["scale"].shape[0]
        group = int(said.get("group_size") or -1)
        group = group if group > 0 and -(-columns // group) == groups else -(-columns // groups)
        zero, version = (0, " v2") if later else (1, "")
        scheme = Gptq(f"GPTQ{version} {bits} bits, groups of {group}", bits=bits, group=group, zero=zero)
        yield found.dense(f"{module}.weight", (codes.shape[1], columns), parts, scheme)
