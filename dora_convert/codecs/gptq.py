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
from .numbers import spread, unpack, values

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("gptq", "auto-round", "auto_round", "autoround")


@dataclass(frozen=True)
class Gptq(Scheme):
    """Words along the input, scales and zero points by groups of inputs."""

    bits: int = 4
    group: int = 128
    zero: int = 1
    """The number that is added to stored zero points."""

    def decode(self, tensor: CodedTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return rows of the dense weight's matrix in float64."""
        import torch

        parts, count, columns = tensor.parts, stop - start, tensor.columns
        words = read.columns(as_matrix(parts["codes"]), 4 * start, 4 * stop).view(-1, count, 4)
        W = unpack(words.transpose(0, 1).reshape(count, -1), self.bits, columns).double()
        first = start // 32 * 32  # 32 codes fill whole words
        stream = read.columns(as_matrix(parts["zero"]), first * self.bits // 8, -(-stop * self.bits // 32) * 4)
        zeros = unpack(stream, self.bits, stop - first)[:, start - first :].double() + self.zero
        part = parts["scale"]
        scale = values(read.columns(as_matrix(part), start * part.itemsize, stop * part.itemsize), part.dtype)
        if "index" in parts:
            group = values(read.rows(as_bytes_of(parts["index"], 1), 0, 1), parts["index"].dtype).int().flatten()
            if not torch.equal(group, torch.arange(columns, dtype=torch.int32, device=W.device) // self.group):
                return W.sub_(zeros.T.index_select(1, group)).mul_(scale.T.index_select(1, group))
        return W.sub_(spread(zeros.T, columns, self.group)).mul_(spread(scale.T, columns, self.group))


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
