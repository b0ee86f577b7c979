"""Look at the numbers of many small tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor

HoldsNumbers = Callable[[memoryview, str], bool]
"""Returns True if some bytes, of a dtype, hold neither NaN nor Inf."""


def in_doubt(tensors: Sequence[StoredTensor], reader: Reader, holds_numbers: HoldsNumbers) -> list[StoredTensor]:
    """Return the tensors that may hold NaN or Inf, in the order given: all those of neighbours that hold one."""
    plain = [each for each in tensors if not (each.is_view or each.coded)]
    runs: list[list[StoredTensor]] = []
    for tensor in sorted(plain, key=lambda each: (each.path, each.start)):
        if runs and _follows(tensor, runs[-1][-1]):
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    right = set[int]()
    for run in runs:
        pieces = reader.span(run[0].path, run[0].start, sum(each.nbytes for each in run))
        if all(holds_numbers(piece, run[0].dtype) for piece in pieces):
            right |= set(map(id, run))
    return [each for each in tensors if id(each) not in right]


def _follows(tensor: StoredTensor, other: StoredTensor) -> bool:
    return (tensor.path, tensor.dtype, tensor.start) == (other.path, other.dtype, other.start + other.nbytes)
