"""Move blocks of stored tensors from file to device and back, through one worker's reused buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..maths import lora as maths
from ..plan.item import KEPT
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .precision import OWN_PAGES, PLACES, TORCH, ComputeSpec, as_bytes, empty, read_rows

if TYPE_CHECKING:
    from .decoding import StoredParts

FACTOR_ELEMENTS = 1 << 18
MOST_VIEWS = 256


class SentBlock(NamedTuple):
    """A result in host memory, or on its way there."""

    host: Tensor
    all_finite: Callable[[], bool]
    """Returns True if the result and its norms hold neither NaN nor Inf."""
    event: Any = None
    """Marks the end of the way; None if the result is there."""

    def wait(self) -> Tensor:
        """Return the result once it is there."""
        if self.event:
            self.event.synchronize()
        return self.host


class Begun(NamedTuple):
    """Some rows of an output that are being computed."""

    raw: Tensor
    start: int
    norms: tuple[Tensor | None, ...]
    """For each edit, the norms that it has divided by."""
    sent: SentBlock


class DeviceBuffers:
    """One worker's memory: reads rows of stored tensors as matrices on the device, and brings results back.

    On a GPU the host buffers are pinned, and each worker has a stream, so that one worker's transfers overlap
    another's arithmetic. Two calls with the same buffer name share memory: the second call overwrites the
    first result. Buffers are `staged` on a GPU, or for a test: then `send` returns before the device is done,
    and results take turns in two buffers.
    """

    def __init__(self, spec: ComputeSpec, reader: Reader, stream: Any = None, worker: int = 0) -> None:
        self.spec = spec
        self.reader = reader
        self.staged, self._cuda, self._turn = spec.staged, spec.device.type == "cuda", 0
        self._lifted: Any = None  # marks when the last raw rows have left host memory
        if self._cuda and stream is None:
            from .streams import stream_of

            stream = stream_of(spec.device, worker)
        self._stream, self._on_host = stream, spec.device.type == "cpu"
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[Any, ...], Tensor] = {}
        """Buffers in the shapes that were asked for: a new view costs a call of torch, and the interpreter's lock."""
        self._exact: DeviceBuffers | None = None
        self._parts: StoredParts | None = None
        self._at_work: Tensor | None = None  # rows that were decoded where arithmetic is done
        self._wholes: dict[tuple[Path, int], Tensor] = {}
        """Whole tensors behind the last views, as they are stored, by file and place."""

    @classmethod
    def dealt(cls, spec: ComputeSpec, reader: Reader) -> Callable[[], DeviceBuffers]:
        """Return a function that makes each worker's buffers, on the devices in turn."""
        deal, numbers = spec.dealt(), count()
        return lambda: cls(deal(), reader, None, next(numbers))

    def exact(self) -> DeviceBuffers:
        """Return buffers in float64 on the same stream; on the host if the device has no float64."""
        if self._exact is None:
            mps = self.spec.device.type == "mps"
            device = torch.device("cpu") if mps else self.spec.device
            spec = ComputeSpec(device, torch.float64, "exact", stages=self.staged and not mps)
            self._exact = DeviceBuffers(spec, self.reader, self._stream)
        return self._exact

    def working(self) -> AbstractContextManager[object]:
        """Return the context in which the tensors of these buffers may be used."""
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def raw(self, stored: StoredTensor, start: int, stop: int, buffer: str = "in") -> Tensor:
        """Read rows of a stored tensor into host memory as they are on disk: (rows, columns).

        Rows of a coded tensor are decoded: float64, on the device. In the buffer "work" they are lifted already.
        """
        if stored.coded:
            return self._decoded(stored, start, stop, buffer)
        if stored.is_view:
            return self._part(stored, range(start, stop), range(stored.matrix[1]))
        columns = stored.matrix[1]
        if self._lifted:
            self._lifted.synchronize()
        host = self.scratch(buffer, (stop - start, columns), TORCH[stored.dtype], on_host=True)
        self.reader.read(stored.path, stored.start + start * columns * stored.itemsize, as_bytes(host))
        return host

    def lift(self, raw: Tensor) -> Tensor:
        """Copy raw rows to the device, in the compute dtype; rows that were decoded there stay."""
        if raw is self._at_work:
            return raw
        on_device = raw if self._on_host else raw.to(self.spec.device, non_blocking=self._cuda)
        self._lifted = self.mark()
        return self.scratch("work", raw.shape, self.spec.compute).copy_(on_device)

    def land(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Round a result to a dtype and copy it to host memory; all buffers of the device are free then."""
        rounded = self._rounded(x, dtype)
        if self.spec.device.type == "cpu" and not self.staged:
            return rounded
        host = self.scratch("out", x.shape, dtype, on_host=True).copy_(rounded, non_blocking=self._cuda)
        if self._stream:
            self._stream.synchronize()
        return host

    def send(self, x: Tensor, dtype: torch.dtype, norms: Sequence[Tensor]) -> SentBlock:
        """Round a result, and copy it to host memory; staged, return before that, and keep the last result, too."""
        if not self.staged:
            host = self.land(x, dtype)
            return SentBlock(host, lambda: maths.all_finite(host) and all(map(maths.all_finite, norms)))
        self._turn ^= 1
        rounded = self._rounded(x, dtype)
        finite = torch.stack([torch.isfinite(each).all() for each in (rounded, *norms)]).all()
        host = self.scratch(f"out {self._turn}", x.shape, dtype, on_host=True).copy_(rounded, non_blocking=self._cuda)
        answer = self.scratch(f"finite {self._turn}", (), torch.bool, on_host=True)
        answer.copy_(finite, non_blocking=self._cuda)
        return SentBlock(host, lambda: bool(answer), self.mark())

    def _rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        single = self.scratch("single", x.shape, torch.float32)
        return maths.round_to(x, self.scratch("rounded", x.shape, dtype), single)

    def mark(self) -> Any:
        """Return an event after all work so far on this worker's stream; None where work is done at once."""
        if not self._stream:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def whole(self, stored: StoredTensor) -> Tensor:
        """Read a whole stored tensor to the device, in the compute dtype and in memory of its own."""
        rows, columns = stored.matrix
        if self._on_host and rows * columns * self.spec.compute.itemsize < OWN_PAGES:
            return self.computed(self.raw(stored, 0, rows, "factor"))
        matrix = self._empty((rows, columns), self.spec.compute, self.spec.device)
        height = max(1, FACTOR_ELEMENTS // max(1, columns))
        for start in range(0, rows, height):
            part = matrix[start : start + height]
            part.copy_(self.raw(stored, start, start + len(part), "factor"))
        return matrix

    def stored(self, stored: StoredTensor) -> Tensor:
        """Read a whole stored tensor into host memory of its own, in the stored dtype."""
        rows, columns = stored.matrix
        if stored.coded:
            return self._decoded(stored, 0, rows, "stored").to("cpu", TORCH[stored.dtype])
        if stored.is_view:
            return self._part(stored, range(rows), range(columns))
        host = empty((rows, columns), TORCH.get(stored.dtype) or PLACES[stored.dtype])
        self.reader.read(stored.path, stored.start, as_bytes(host))
        return host

    def computed(self, host: Tensor) -> Tensor:
        """Copy a host tensor to the device, in the compute dtype."""
        on_device = host if self._on_host else host.to(self.spec.device)
        return on_device.to(self.spec.compute, copy=True)

    def rows(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        """Read some rows of a small stored tensor to the device."""
        return self.computed(self.raw(stored, start, stop, "factor"))

    def columns(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        """Read some columns of a small stored tensor to the device."""
        rows, columns = stored.matrix
        if stored.is_view:
            return self.computed(self._part(stored, range(rows), range(start, stop)))
        host = self.scratch("factor", (rows, stop - start), TORCH[stored.dtype], on_host=True)
        for row in range(rows):
            offset = stored.start + (row * columns + start) * stored.itemsize
            self.reader.read(stored.path, offset, as_bytes(host[row]))
        return self.computed(host)

    def _part(self, stored: StoredTensor, rows: range, columns: range) -> Tensor:
        """Read part of a view.

        The parts of a strided factor lie all over it: the whole is kept, or each expert would read it once more.
        """
        from .view_reading import show, taken

        if stored.kept:
            return show(stored, rows, columns, lambda whole, lines: taken(self._kept(whole), lines, 0))
        return show(stored, rows, columns, partial(read_rows, self.reader))

    def _kept(self, whole: StoredTensor) -> Tensor:
        """Return a whole matrix as it is stored, read now or kept from before: at most KEPT of about one size."""
        place = (whole.path, whole.start)
        if (tensor := self._wholes.pop(place, None)) is None:
            while len(self._wholes) >= KEPT or sum(each.nbytes for each in self._wholes.values()) > whole.nbytes:
                self._wholes.pop(next(iter(self._wholes)))
            tensor = empty(whole.shape, TORCH[whole.dtype])
            self.reader.read(whole.path, whole.start, as_bytes(tensor))
        self._wholes[place] = tensor
        return tensor

    def _decoded(self, stored: StoredTensor, start: int, stop: int, buffer: str) -> Tensor:
        """Decode rows of a coded tensor."""
        from .decoding import StoredParts, decode

        host = self.spec.device.type == "mps"  # which has no float64
        device = torch.device("cpu") if host else self.spec.device
        self._parts = self._parts or StoredParts(self.reader, device)
        in_place = buffer == "work" and self.spec.compute == torch.float64
        name = buffer if in_place else f"{buffer}, decoded"
        out = self.scratch(name, (stop - start, stored.matrix[1]), torch.float64, on_host=host)
        self._at_work = out if in_place else None
        return decode(stored, self._parts, start, out)

    def forget(self) -> None:
        """Forget the whole tensors behind views, and strips of coded tensors."""
        self._wholes.clear()
        self._parts = None

    def release(self) -> None:
        """Free all buffers, for another worker that may need the memory."""
        self._buffers.clear()
        self._views.clear()
        self.forget()
        if self._exact:
            self._exact.release()

    def scratch(self, name: str, shape: Sequence[int], dtype: torch.dtype, *, on_host: bool = False) -> Tensor:
        """Return memory that the next call of the name reuses: fresh pages cost more than arithmetic."""
        key = (name, dtype, *shape)
        if (known := self._views.get(key)) is not None:
            return known
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < nbytes or len(self._views) > MOST_VIEWS:
            self._views.clear()
            self._buffers.pop(name, None)
            del buffer
            device = torch.device("cpu") if on_host else self.spec.device
            buffer = self._buffers[name] = self._empty((nbytes,), torch.uint8, device)
        view = self._views[key] = buffer[:nbytes].view(dtype).view(tuple(shape))
        return view

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor; pinned on the host of a GPU."""
        if device.type == "cpu" and not self._cuda:
            return empty(shape, dtype)
        return torch.empty(tuple(shape), dtype=dtype, device=device, pin_memory=device.type == "cpu")
