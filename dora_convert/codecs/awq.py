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
from .numbers import values

if TYPE_CHECKING:
    from torch import Tensor

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word of each of its 8 outputs."""


@dataclass(frozen=True)
class Awq(Scheme):
    """Words along the output, scales and zero points by groups of inputs."""

    group: int = 128

    def decode(self, tensor: CodedTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return rows of the dense weight's matrix in float64."""
        part = tensor.parts["scale"]
        raw = read.columns(as_matrix(part), start * part.itemsize, stop * part.itemsize)
        scale, zeros = values(raw, part.dtype).T, _outputs(tensor.parts["zero"], read, start, stop)
        W = _outputs(tensor.parts["codes"], read, start, stop)
        blocks = W.view(len(W), -1, self.group)
        blocks.sub_(zeros.unsqueeze(2)).mul_(scale.unsqueeze(2))
        return W


def _outputs(part: StoredTensor, read: PartReader, start: int, stop: int) -> Tensor:
    """Return the codes of some outputs, for every row of a part: float64 (stop − start, rows)."""
    import torch

    first, last = start // 8, -(-stop // 8)
    words = read.columns(as_matrix(part), 4 * first, 4 * last).view(torch.int32).T.contiguous()
    codes = torch.empty((last - first, 8, words.shape[1]), dtype=torch.float64, device=words.device)
    for output, place in enumerate(PLACES):
        codes[:, output] = words >> 4 * place & 15
    return codes.view(-1, words.shape[1])[start - 8 * first : stop - 8 * first]


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
