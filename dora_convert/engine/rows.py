"""Some rows or columns of stored tensors, as they are on disk: for checking, which looks at a sample."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MalformedError
from ..plan.item import Item
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .precision import TORCH


def read_rows(reader: Reader, tensor: StoredTensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a stored tensor's matrix, in its own dtype."""
    width = tensor.matrix[1]
    runs = [(start * width, count * width) for start, count in _runs(rows)]
    return _gather(reader, tensor, runs).view(len(rows), width)


def read_columns(reader: Reader, tensor: StoredTensor, columns: Sequence[int]) -> Tensor:
    """Some columns of a stored tensor's matrix, in its own dtype."""
    height, width = tensor.matrix
    runs = [(row * width + start, count) for row in range(height) for start, count in _runs(columns)]
    return _gather(reader, tensor, runs).view(height, len(columns))


def replaced_rows(item: Item, reader: Reader) -> dict[int, tuple[StoredTensor, int]]:
    """Where the base's rows are found that were replaced: in the record where they differ, else in the adapter."""
    found = {row: (rows.value, place) for rows in item.rows for place, row in enumerate(rows.index)}
    if item.undo and item.undo.kept:
        values, index = item.undo.kept
        data = bytearray(index.nbytes)
        reader.read(index.path, index.start, memoryview(data))
        numbers = struct.unpack(f"<{index.numel}q", data)
        first, last = (item.source.matrix[0], item.base.matrix[0]) if item.base else (0, 0)
        complete = last - first <= len(numbers) and {*range(first, last)} <= {*numbers}
        if not complete or not all(0 <= number < max(first, last) for number in numbers):
            raise MalformedError(f"{index.path}: {index.name} names other rows than were kept.")
        found |= {row: (values, place) for place, row in enumerate(numbers)}
    return found


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(start, count) of each run of neighbours."""
    if isinstance(numbers, range):
        return [(numbers.start, len(numbers))]
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _gather(reader: Reader, tensor: StoredTensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Runs of elements, given by (first, count), one after another."""
    size = tensor.itemsize
    data = bytearray(size * sum(count for _, count in runs))
    view, position = memoryview(data), 0
    for first, count in runs:
        reader.read(tensor.path, tensor.start + first * size, view[position : position + count * size])
        position += count * size
    dtype = TORCH[tensor.dtype]
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
