"""Hold tensors in host memory, and read rows and columns of stored tensors into it."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .precision import TORCH

OWN_PAGES = 1 << 20
"""Bytes from which a tensor gets pages of its own.

The C library keeps the pages of freed large tensors, in pieces that the next tensor often does not fit. Two
copies of the largest factor would stay resident for each worker.
"""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised CPU tensor whose memory goes back to the system with the tensor."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < OWN_PAGES:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(tuple(shape))


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without a copy; the bytes keep the tensor alive."""
    nbytes = tensor.numel() * tensor.element_size()
    array = (ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def read_rows(reader: Reader, tensor: StoredTensor, rows: Sequence[int]) -> Tensor:
    """Read some rows of a stored tensor's matrix, in the stored dtype."""
    width = tensor.matrix[1]
    runs = [(start * width, count * width) for start, count in _runs(rows)]
    return _gather(reader, tensor, runs).view(len(rows), width)


def read_columns(reader: Reader, tensor: StoredTensor, columns: Sequence[int]) -> Tensor:
    """Read some columns of a stored tensor's matrix, in the stored dtype."""
    height, width = tensor.matrix
    runs = [(row * width + start, count) for row in range(height) for start, count in _runs(columns)]
    return _gather(reader, tensor, runs).view(height, len(columns))


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, count) of each run of neighbours."""
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
    """Read runs of elements, each given by (first, count), into one flat tensor."""
    size = tensor.itemsize
    data = bytearray(size * sum(count for _, count in runs))
    view, position = memoryview(data), 0
    for first, count in runs:
        reader.read(tensor.path, tensor.start + first * size, view[position : position + count * size])
        position += count * size
    dtype = TORCH[tensor.dtype]
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
