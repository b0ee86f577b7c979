"""Decode the commonest layout: codes lie in rows, and blocks of them share a scale.

    W = (q − z)·s + b

q are floats of 8 bits, bytes, or integers of 2 to 8 bits without gaps; z (zero points) and b (biases) are
optional. Most kinds of quantisation are this with other names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..storage.safetensors import StoredTensor
from .coded import CodedTensor, PartReader, Scheme, as_bytes_of, as_matrix
from .numbers import E2M1, FLOATS8, by_groups, look_up_pairs, pick, row_pieces, table_of, unpack, values

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

    def fill(self, tensor: CodedTensor, read: PartReader, start: int, out: Tensor) -> None:
        """Fill `out` with rows of the dense weight's matrix from `start` on."""
        import torch

        stop, parts = start + len(out), tensor.parts
        self._fill_codes(read.rows(as_matrix(parts["codes"]), start, stop), out)
        if "zero" in parts:
            self._apply(tensor, read, out, self._zeros(tensor, read, start, stop), torch.Tensor.sub_)
        self._apply(tensor, read, out, self.scales(tensor, read, start, stop), torch.Tensor.mul_)
        if "bias" in parts:
            self._apply(tensor, read, out, self._by_rows(parts["bias"], read, start, stop), torch.Tensor.add_)

    def _fill_codes(self, raw: Tensor, out: Tensor) -> None:
        """Fill `out` with the values of codes, before any scale."""
        import torch

        if self.grid == "E2M1":
            look_up_pairs(raw, E2M1, out)
        elif self.grid in ("signed", "unsigned"):
            middle = 1 << self.bits - 1 if self.grid == "signed" else 0
            if self.bits == 4:
                look_up_pairs(raw, tuple(float(code - middle) for code in range(16)), out)
            else:
                out.copy_(unpack(raw, self.bits, out.shape[1])).sub_(middle)
        elif self.grid in FLOATS8:
            pick(table_of(self.grid, raw.device), raw, out)
        else:
            out.copy_(raw.view(torch.int8))

    def meant(self, dtype: str) -> str:
        """Return the dtype that the numbers of a stored dtype have."""
        return self.scale_bytes if self.scale_bytes and dtype == "U8" else dtype

    def scales(self, tensor: CodedTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return the scales of rows: (stop − start, groups of columns)."""
        scale = self._by_rows(tensor.parts["scale"], read, start, stop)
        scale = scale if self.factor == 1 else scale * self.factor
        if overall := tensor.parts.get("global"):
            number = values(read.rows(as_bytes_of(overall, 1), 0, 1), overall.dtype)
            return scale / number if self.divides else scale * number
        return scale

    def _by_rows(self, part: StoredTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return a part's numbers for each row of the weight."""
        import torch

        matrices, each = self.scale_rows(part)
        row = torch.arange(start, stop)
        row = row // self.height * each + (row % self.height // self.rows).clamp_(max=each - 1)
        first, last = int(row[0]), int(row[-1])
        raw = read.rows(as_bytes_of(part, matrices * each), first, last + 1)
        numbers = values(raw, self.meant(part.dtype))
        return numbers if len(numbers) == len(row) else numbers.index_select(0, (row - first).to(raw.device))

    def scale_rows(self, part: StoredTensor) -> tuple[int, int]:
        """Return the number of matrices of a part that has one number a block, and the rows of each."""
        return (part.shape[0] if len(part.shape) == 3 else 1), max(1, -(-self.height // self.rows))

    def _apply(
        self,
        tensor: CodedTensor,
        read: PartReader,
        W: Tensor,
        numbers: Tensor,
        apply: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Apply an operation in place to W and to one number for each group of columns."""
        if numbers.shape[1] == 1 or not (index := tensor.parts.get("index")):
            by_groups(W, numbers, self.columns, apply)
            return
        group = values(read.rows(as_bytes_of(index, 1), 0, 1), index.dtype).int().flatten().clamp_(min=0)
        for rows in row_pieces(W):
            apply(W[rows], numbers[rows].index_select(1, group))

    def _zeros(self, tensor: CodedTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return the zero points of rows, for each group of columns."""
        part = tensor.parts["zero"]
        if not self.packed_zeros:
            return self._by_rows(part, read, start, stop)
        first = start // 32 * 32  # 32 codes fill whole words
        words = read.rows(as_matrix(part), first * self.bits // 32, -(-stop * self.bits // 32))
        stream = words.view(len(words), -1, 4).transpose(0, 1).flatten(1)
        zeros = unpack(stream, self.bits, stop - first)[:, start - first :]
        middle = 1 << self.bits - 1 if self.grid == "signed" else 0
        return zeros.T.double() - middle
