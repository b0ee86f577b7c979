"""Decode the commonest layout: codes lie in rows, and blocks of them share a scale.

    W = (q − z)·s + b

q are floats of 8 bits, bytes, or integers of 2 to 8 bits without gaps; z (zero points) and b (biases) are
optional. Most kinds of quantisation are this with other names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..storage.safetensors import StoredTensor
from .coded import CodedTensor, PartReader, Scheme, as_bytes_of, as_matrix
from .numbers import E2M1, grouped, pairs, unpack, values

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Blocks(Scheme):
    """Codes in rows, with a scale for each block of rows and columns."""

    grid: str = "F8_E4M3"
    """The values of codes: a stored dtype, "E2M1", "unsigned", or "signed": unsigned less half of their range."""
    bits: int = 8
    height: int = 1
    """The rows of one matrix; several matrices of experts lie one below the other."""
    rows: int = 1
    """The rows that share a scale."""
    columns: int = 1
    """The columns that share a scale."""
    factor: float = 1.0
    """A number that every scale is multiplied by."""
    divides: bool = False
    """True if the part "global" divides the scales instead of multiplying them."""
    scale_bytes: str | None = None
    """The dtype of scales that are stored as U8."""
    balanced: bool = False
    """True if the least code is as far from zero as the largest."""
    packed_zeros: bool = False
    """True if zero points are packed like codes, along the rows."""

    makes: ClassVar[tuple[str, ...]] = ("scale", "zero", "bias")

    @property
    def step(self) -> int:
        """The rows that share a scale."""
        return 0 if self.rows >= self.height else self.rows

    def decode(self, tensor: CodedTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return rows of the dense weight's matrix in float64."""
        W = self.codes(tensor, read, start, stop)
        if "zero" in tensor.parts:
            view, numbers = self._across(tensor, read, W, self._zeros(tensor, read, start, stop))
            view.sub_(numbers)
        view, numbers = self._across(tensor, read, W, self.scales(tensor, read, start, stop))
        view.mul_(numbers)
        if "bias" in tensor.parts:
            bias = values(self._by_rows(tensor.parts["bias"], read, start, stop), tensor.parts["bias"].dtype)
            view, numbers = self._across(tensor, read, W, bias)
            view.add_(numbers)
        return W

    def codes(self, tensor: CodedTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return the values of codes, before any scale: (stop − start, columns)."""
        raw, count = read.rows(as_matrix(tensor.parts["codes"]), start, stop), tensor.columns
        if self.grid == "E2M1":
            return pairs(raw, E2M1)[:, :count].contiguous()
        if self.grid in ("signed", "unsigned"):
            middle = 1 << self.bits - 1 if self.grid == "signed" else 0
            if self.bits == 4:
                return pairs(raw, tuple(float(code - middle) for code in range(16)))[:, :count].contiguous()
            return unpack(raw, self.bits, count).double().sub_(middle)
        return values(raw, self.grid)

    def meant(self, dtype: str) -> str:
        """Return the dtype that the numbers of a stored dtype have."""
        return self.scale_bytes if self.scale_bytes and dtype == "U8" else dtype

    def scales(self, tensor: CodedTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return the scales of rows: (stop − start, groups of columns)."""
        part = tensor.parts["scale"]
        raw = self._by_rows(part, read, start, stop)
        scale = values(raw, self.meant(part.dtype))
        scale = scale if self.factor == 1 else scale * self.factor
        if overall := tensor.parts.get("global"):
            number = values(read.rows(as_bytes_of(overall, 1), 0, 1), overall.dtype)
            return scale / number if self.divides else scale * number
        return scale

    def _by_rows(self, part: StoredTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return a part's row for each row of the weight, as bytes."""
        import torch

        matrices, each = self.scale_rows(part)
        row = torch.arange(start, stop)
        row = row // self.height * each + (row % self.height // self.rows).clamp_(max=each - 1)
        first, last = int(row[0]), int(row[-1])
        raw = read.rows(as_bytes_of(part, matrices * each), first, last + 1)
        return raw[(row - first).to(raw.device)]

    def scale_rows(self, part: StoredTensor) -> tuple[int, int]:
        """Return the number of matrices of a part that has one number a block, and the rows of each."""
        return (part.shape[0] if len(part.shape) == 3 else 1), max(1, -(-self.height // self.rows))

    def _across(self, tensor: CodedTensor, read: PartReader, W: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of W and of one number for each group of columns that broadcast."""
        if numbers.shape[1] > 1 and (index := tensor.parts.get("index")):
            group = values(read.rows(as_bytes_of(index, 1), 0, 1), index.dtype).long().flatten()
            return W, numbers[:, group.clamp_(min=0)]
        return grouped(W, numbers, self.columns)

    def _zeros(self, tensor: CodedTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return the zero points of rows, for each group of columns."""
        part = tensor.parts["zero"]
        if not self.packed_zeros:
            return values(self._by_rows(part, read, start, stop), part.dtype)
        first = start // 32 * 32  # 32 codes fill whole words
        words = read.rows(as_matrix(part), first * self.bits // 32, -(-stop * self.bits // 32))
        stream = words.view(len(words), -1, 4).transpose(0, 1).flatten(1)
        zeros = unpack(stream, self.bits, stop - first)[:, start - first :]
        middle = 1 << self.bits - 1 if self.grid == "signed" else 0
        return zeros.T.double() - middle
