"""Describe a coded tensor: a dense weight whose bytes are codes, scales and other parts on disk.

A `Scheme` knows how parts become values. Each file of this room builds schemes for one kind of quantisation
from headers and configs. Torch is imported when values are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..records import record
from ..storage.safetensors import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_ELEMENTS = 1 << 19
"""Elements that are decoded or coded together: a processor's block. In smaller pieces Python takes as long as torch."""
DECODING = 10 << 20
"""Bytes that are held while a block is decoded: strips of the codes, and the steps between code and value."""
STRIP_BYTES = 4 << 20
"""Bytes of a strip of columns that are read together, where rows of the weight are columns on disk."""


class PartReader(Protocol):
    """Reads parts of coded tensors as bytes, on the device that decodes them."""

    held: dict[tuple[Path, int], Any]
    """Kept between calls: codes of a whole tensor, by its path and first byte."""

    def rows(self, part: StoredTensor, start: int, stop: int) -> Tensor:
        """Return rows of a part, seen as a matrix with its own last dimension: uint8 (rows, bytes of a row)."""

    def columns(self, part: StoredTensor, start: int, stop: int) -> Tensor:
        """Return bytes `start` to `stop` of every row of a part: uint8 (rows, stop − start)."""


@dataclass(frozen=True)
class Scheme:
    """One way to code a tensor: its title for reports, and the arithmetic between parts and values."""

    title: str
    """The kind in a few words, such as "fp8, blocks of 128 × 128"."""

    writes: ClassVar[str] = "never"
    """"back" if merged weights are coded again by default, "asked" if only --requantize does, or "never"."""

    makes: ClassVar[tuple[str, ...]] = ()
    """The parts beside the codes that a changed weight gets anew."""

    @property
    def step(self) -> int:
        """The rows that share a scale: blocks of a write-back are multiples of them; 0 for all rows."""
        return 1

    def whole(self, tensor: CodedTensor) -> int:  # noqa: ARG002 - for schemes that hold a whole weight
        """Return the bytes that are held for the whole weight while any row of it is decoded."""
        return 0

    def fill(self, tensor: CodedTensor, read: PartReader, start: int, out: Tensor) -> None:
        """Fill `out`, contiguous float64 (rows, columns), with rows of the dense weight's matrix from `start` on."""
        raise NotImplementedError


@record(frozen=True, slots=True)
class CodedTensor(StoredTensor):
    """A dense weight that is decoded as it is read; `path` and `start` are those of its codes."""

    scheme: Scheme
    parts: Mapping[str, StoredTensor] = field(hash=False, compare=False)
    """The stored tensors by role: codes, scale, and whatever else the scheme has."""

    @property
    def coded(self) -> bool:
        """True: the bytes on disk are not the values."""
        return True

    def held(self, block: int, *, again: bool = False) -> int:
        """Return the bytes held beside a block of so many elements to decode it, and to code it `again`."""
        whole = max(block, self.scheme.step * self.columns)
        return 8 * block + DECODING + (24 * whole if again else 0) + self.scheme.whole(self)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that hold the parts, each once."""
        return tuple(dict.fromkeys(part.path for part in self.parts.values()))

    @property
    def columns(self) -> int:
        """Elements of a row: the last dimension."""
        return self.shape[-1] if self.shape else 1

    def named(self, role: str) -> str:
        """Return the name on disk of a part."""
        return self.parts[role].name


def as_matrix(part: StoredTensor) -> StoredTensor:
    """Return a part as bytes: (rows, bytes of a row), all dimensions but the last as rows."""
    columns = part.shape[-1] if part.shape else 1
    return as_bytes_of(part, part.numel // max(1, columns))


def as_bytes_of(part: StoredTensor, rows: int) -> StoredTensor:
    """Return a part as a matrix of bytes with some number of rows."""
    return replace(part, dtype="U8", shape=(rows, part.nbytes // max(1, rows)))
