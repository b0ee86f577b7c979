"""AWQ's gemm layout: the output lies along the words, in an order of its own.

    X.qweight  I32 (K, N/8), 8 codes a word, in the order 0 2 4 6 1 3 5 7, low bits first
    X.qzeros   I32 (K/group, N/8), in the same order
    X.scales   F16 (K/group, N)

    W[n, k] = s[k/group, n]·(q[k, n] − z[k/group, n])

Calibration chose the codes, so they are never made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..storage.safetensors import StoredTensor
from .coded import CodedTensor, PartReader, Scheme, as_matrix
from .evidence import Evidence
from .numbers import by_groups, values

if TYPE_CHECKING:
    from torch import Tensor

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word of each of its 8 outputs."""


@dataclass(frozen=True)
class Awq(Scheme):
    """Words along the output, scales and zero points by groups of inputs."""

    group: int = 128

    def fill(self, tensor: CodedTensor, read: PartReader, start: int, out: Tensor) -> None:
        """Fill `out` with rows of the dense weight's matrix from `start` on."""
        import torch

        part, stop = tensor.parts["scale"], start + len(out)
        raw = read.columns(as_matrix(part), start * part.itemsize, stop * part.itemsize)
        zeros = out.new_empty(len(out), part.shape[0])
        _outputs(tensor.parts["zero"], read, start, zeros)
        _outputs(tensor.parts["codes"], read, start, out)
        by_groups(out, zeros, self.group, torch.Tensor.sub_)
        by_groups(out, values(raw, part.dtype).T.contiguous(), self.group, torch.Tensor.mul_)


def _outputs(part: StoredTensor, read: PartReader, start: int, out: Tensor) -> None:
    """Fill float64 (outputs, rows) with the codes of some outputs, for every row of a part."""
    import torch

    first, last = start // 8, -(-(start + len(out)) // 8)
    words = read.columns(as_matrix(part), 4 * first, 4 * last).view(torch.int32).T.contiguous()
    whole = len(out) == 8 * len(words)
    codes = (out if whole else out.new_empty(8 * len(words), out.shape[1])).view(-1, 8, out.shape[1])
    for output, place in enumerate(PLACES):
        codes[:, output] = (words >> 4 * place).bitwise_and_(15)
    if not whole:
        out.copy_(codes.view(-1, out.shape[1])[start - 8 * first :][: len(out)])


def claim(found: Evidence) -> Iterator[CodedTensor]:
    """Yield every AWQ weight in the gemm layout."""
    said = found.method("awq") or {}
    if str(said.get("version", "gemm")).lower() != "gemm" or int(said.get("bits") or 4) != 4 or not said:
        return
    for module, codes in found.ending(".qweight"):
        parts = {"codes": codes, **found.present({"zero": f"{module}.qzeros", "scale": f"{module}.scales"})}
        if len(parts) < 3 or codes.dtype != "I32" or len(codes.shape) != 2:
            continue
        group, rest = divmod(codes.shape[0], max(1, parts["scale"].shape[0]))
        if rest or not group:
            continue
        scheme = Awq(f"AWQ 4 bits, groups of {group}", group=group)
        yield found.dense(f"{module}.weight", (8 * codes.shape[1], codes.shape[0]), parts, scheme)
