"""Host memory that goes back to the system when its tensor does.

The C library keeps what large tensors leave behind, in pieces that the next one often does not fit; two copies of the
largest factor would stay resident for each worker.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

OWN_PAGES = 1 << 20
"""Bytes from which a tensor gets pages of its own."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < OWN_PAGES:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(tuple(shape))


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; they keep the tensor alive."""
    nbytes = tensor.numel() * tensor.element_size()
    array = (ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
