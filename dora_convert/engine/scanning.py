"""Look at the numbers of many small tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor

HoldsNumbers = Callable[[memoryview, str], bool]
"""Returns True if some bytes, of a dtype, hold neither NaN nor Inf."""


def in_doubt(tensors: Sequence[StoredTensor], reader: Reader, holds_numbers: HoldsNumbers) -> list[StoredTensor]:
    """Return the tensors that may hold NaN or Inf, in the order given: all those of neighbours that hold one."""
    plain = [each for each in tensors if not (each.is_view or each.coded)]
    right = set[int]()
    for run in _runs(plain):
        path, first, last = run[0].path, run[0].start, run[-1].start + run[-1].nbytes
        if all(holds_numbers(piece, run[0].dtype) for piece in reader.span(path, first, last - first)):
            right.update(map(id, run))
    return [each for each in tensors if id(each) not in right]


def _runs(tensors: Iterable[StoredTensor]) -> list[list[StoredTensor]]:
    """Return the tensors by runs of neighbours of one dtype."""
    runs: list[list[StoredTensor]] = []
    after = None
    for tensor in sorted(tensors, key=lambda each: (each.path, each.start)):
        if (tensor.path, tensor.dtype, tensor.start) != after:
            runs.append([])
        runs[-1].append(tensor)
        after = (tensor.path, tensor.dtype, tensor.start + tensor.nbytes)
    return runs
