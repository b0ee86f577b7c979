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
from .numbers import by_groups, look_up_pairs, nibbles, pick, row_pieces, unpack, values

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

    def fill(self, tensor: CodedTensor, read: PartReader, start: int, out: Tensor) -> None:
        """Fill `out` with rows of the dense weight's matrix from `start` on."""
        import torch

        parts, stop = tensor.parts, start + len(out)
        words = read.columns(as_matrix(parts["codes"]), 4 * start, 4 * stop).view(torch.int32)
        raw = words.T.contiguous().view(torch.uint8)
        first = start // 32 * 32  # 32 codes fill whole words
        stream = read.columns(as_matrix(parts["zero"]), first * self.bits // 8, -(-stop * self.bits // 32) * 4)
        zeros = unpack(stream, self.bits, stop - first)[:, start - first :].double() + self.zero
        part = parts["scale"]
        scale = values(read.columns(as_matrix(part), start * part.itemsize, stop * part.itemsize), part.dtype)
        numbers = zeros.T.contiguous(), scale.T.contiguous()
        group = self._order(tensor, read)
        if group is not None and self.bits <= 4:
            self._fill_by_table(raw, group, *numbers, out)
            return
        if self.bits == 4:
            look_up_pairs(raw, FOUR_BITS, out)
        else:
            out.copy_(unpack(raw, self.bits, out.shape[1]))
        for number, apply in zip(numbers, (torch.Tensor.sub_, torch.Tensor.mul_), strict=True):
            if group is None:
                by_groups(out, number, self.group, apply)
                continue
            for rows in row_pieces(out):
                apply(out[rows], number[rows].index_select(1, group))

    def _order(self, tensor: CodedTensor, read: PartReader) -> Tensor | None:
        """Return the group of each input: int32; None if groups are neighbours."""
        import torch

        if not (part := tensor.parts.get("index")):
            return None
        group = values(read.rows(as_bytes_of(part, 1), 0, 1), part.dtype).int().flatten()
        usual = torch.arange(len(group), dtype=torch.int32, device=group.device) // self.group
        return None if torch.equal(group, usual) else group

    def _fill_by_table(self, raw: Tensor, group: Tensor, zeros: Tensor, scale: Tensor, out: Tensor) -> None:
        """Look each value up among those that the codes of its row and group can have."""
        import torch

        codes = torch.arange(1 << self.bits, dtype=torch.float64, device=raw.device)
        table = (codes - zeros.unsqueeze(2)).mul_(scale.unsqueeze(2))
        row = torch.arange(len(raw), dtype=torch.int32, device=raw.device) * table[0].numel()
        for rows in row_pieces(out):
            place = nibbles(raw[rows]) if self.bits == 4 else unpack(raw[rows], self.bits, out.shape[1]).int()
            place.add_(group * len(codes)).add_(row[rows, None])
            pick(table.view(-1), place, out[rows])


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
