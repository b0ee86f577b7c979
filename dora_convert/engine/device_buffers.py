"""One worker's way from file to device and back: reused buffers, and one stream where there is a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..maths import lora as maths
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from . import memory
from .memory import as_bytes
from .precision import TORCH, ComputeSpec

FACTOR_ELEMENTS = 1 << 18


class DeviceBuffers:
    """Reads rows of stored tensors as matrices on the device, and brings results back as bytes.

    On a GPU the host buffers are pinned and everything runs on the lane's own stream, so that one lane's transfers
    overlap another's arithmetic. Two calls of `rows` share a buffer: the first result's bytes are gone after the
    second, its matrix is too on the CPU.
    """

    def __init__(self, spec: ComputeSpec, reader: Reader, stream: Any = None) -> None:
        self.spec = spec
        self.reader = reader
        self._cuda = spec.device.type == "cuda"
        if self._cuda and stream is None:
            stream = torch.cuda.Stream(spec.device)  # type: ignore[no-untyped-call]
        self._stream = stream
        self._buffers: dict[str, Tensor] = {}
        self._exact: DeviceBuffers | None = None

    def exact(self) -> DeviceBuffers:
        """Another lane beside this one, on the same stream: in float64, and on the host where the device has none."""
        if self._exact is None:
            mps = self.spec.device.type == "mps"
            device = torch.device("cpu") if mps else self.spec.device
            self._exact = DeviceBuffers(
                ComputeSpec(device, torch.float64, "exact"), self.reader, self._stream
            )
        return self._exact

    def working(self) -> AbstractContextManager[object]:
        """The context in which this lane's tensors may be used."""
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def raw(self, stored: StoredTensor, start: int, stop: int, buffer: str = "in") -> Tensor:
        """Rows of a stored tensor as they are on disk: (rows, columns), in host memory."""
        columns = stored.matrix[1]
        host = self.scratch(buffer, (stop - start, columns), TORCH[stored.dtype], on_host=True)
        self.reader.read(stored.path, stored.start + start * columns * stored.itemsize, as_bytes(host))
        return host

    def lift(self, raw: Tensor) -> Tensor:
        """Raw rows in the compute dtype, on the device."""
        on_device = raw.to(self.spec.device, non_blocking=self._cuda)
        return self.scratch("work", raw.shape, self.spec.compute).copy_(on_device)

    def land(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A result rounded to a dtype, in host memory; the device has finished with all buffers when this returns."""
        single = self.scratch("single", x.shape, torch.float32)
        rounded = maths.round_to(x, self.scratch("rounded", x.shape, dtype), single)
        if self.spec.device.type == "cpu":
            return rounded
        host = self.scratch("out", x.shape, dtype, on_host=True).copy_(rounded, non_blocking=self._cuda)
        if self._stream:
            self._stream.synchronize()
        return host

    def whole(self, stored: StoredTensor) -> Tensor:
        """A stored tensor as a matrix in the compute dtype, on the device, in memory of its own."""
        rows, columns = stored.matrix
        matrix = self._empty((rows, columns), self.spec.compute, self.spec.device)
        height = max(1, FACTOR_ELEMENTS // max(1, columns))
        for start in range(0, rows, height):
            part = matrix[start : start + height]
            part.copy_(self.raw(stored, start, start + len(part), "factor"))
        return matrix

    def stored(self, stored: StoredTensor) -> Tensor:
        """A stored tensor as a matrix in its own dtype, in host memory of its own."""
        rows, columns = stored.matrix
        host = memory.empty((rows, columns), TORCH[stored.dtype])
        self.reader.read(stored.path, stored.start, as_bytes(host))
        return host

    def computed(self, host: Tensor) -> Tensor:
        """A copy of a host tensor in the compute dtype, on the device."""
        return host.to(self.spec.device).to(self.spec.compute, copy=True)

    def rows(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        """Some rows of a small stored tensor."""
        return self.computed(self.raw(stored, start, stop, "factor"))

    def columns(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        """Some columns of a small stored tensor."""
        rows, columns = stored.matrix
        host = self.scratch("factor", (rows, stop - start), TORCH[stored.dtype], on_host=True)
        for row in range(rows):
            offset = stored.start + (row * columns + start) * stored.itemsize
            self.reader.read(stored.path, offset, as_bytes(host[row]))
        return self.computed(host)

    def release(self) -> None:
        """Give the memory of buffers back, where another lane may need it."""
        self._buffers.clear()
        if self._exact:
            self._exact.release()

    def scratch(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, *, on_host: bool = False
    ) -> Tensor:
        """Memory that the next call of the same name uses again: fresh pages cost more than the arithmetic."""
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < nbytes:
            self._buffers.pop(name, None)
            device = torch.device("cpu") if on_host else self.spec.device
            buffer = self._buffers[name] = self._empty((nbytes,), torch.uint8, device)
        return buffer[:nbytes].view(dtype).view(tuple(shape))

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; on the host of a GPU it is pinned."""
        if device.type == "cpu" and not self._cuda:
            return memory.empty(shape, dtype)
        return torch.empty(tuple(shape), dtype=dtype, device=device, pin_memory=device.type == "cpu")
