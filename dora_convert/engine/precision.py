"""Choose the device and the dtype of arithmetic; hold, read, check and round tensors on the host.

Distances to rounded values are counted in units in the last place (ulps).
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import torch
from torch import Tensor

from ..adapters import Adapter, low_rank
from ..errors import Fault, NumericalError, UsageError
from ..maths import lora as maths
from ..storage.reader import Reader, xxh3
from ..storage.safetensors import FLOATS, StoredTensor

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""torch's dtypes by their safetensors names, for all dtypes that arithmetic is done on."""
PLACES = {"I32": torch.int32, "I64": torch.int64}
"""The same for the dtypes of indices."""
GRID = {"BF16": (8, -126), "F16": (11, -14), "F32": (24, -126), "F64": (53, -1022)}
"""Precision in bits and the least exponent of each dtype."""
NEAR_BYTES = 1 << 17
"""Rows that lie within so many bytes are read at once, with the rows between them: a call costs more."""
EXPONENT = 0x7FF << 52  # of a float64
OWN_PAGES = 1 << 20
"""Bytes from which a tensor gets pages of its own.

The C library keeps the pages of freed large tensors, in pieces that the next tensor often does not fit. Two
copies of the largest factor would stay resident for each worker.
"""
MANY = 1000
"""From so many tensors on, small neighbours are looked at together."""
PARTS = frozenset({2, 4, 8, 16, 32, 64, 128, 256})
"""Numbers of ranks that share a tensor in ZeRO-3."""


@dataclass(frozen=True)
class ComputeSpec:
    """A device, the dtype of arithmetic, and the reason for the choice."""

    device: torch.device
    compute: torch.dtype
    reason: str
    others: tuple[torch.device, ...] = ()
    """Further devices that workers are dealt over, all of one kind."""
    stages: bool = False
    """True if a processor is to do as a device does."""

    @property
    def staged(self) -> bool:
        """True if blocks pass through host memory on their way: they are large, read ahead and finished later."""
        return self.stages or self.device.type == "cuda"

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices, in the order that workers are dealt over them."""
        return (self.device, *self.others)

    @property
    def title(self) -> str:
        """The devices as users write them, such as cuda:0,1."""
        first, *others = map(str, self.devices)
        return ",".join([first, *(name.removeprefix("cuda:") for name in others)])

    def dealt(self) -> Callable[[], ComputeSpec]:
        """Return a function that gives each worker, when it starts, its device: one after the other, in turn."""
        numbers, devices = count(), self.devices
        return lambda: replace(self, device=devices[next(numbers) % len(devices)], others=())

    @property
    def compute_name(self) -> str:
        """The compute dtype as users write it, such as float64."""
        return str(self.compute).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.title}, {self.compute_name} ({self.reason})"


def choose(device: str = "auto", compute_dtype: str = "auto") -> ComputeSpec:
    """Choose the devices and the dtype that `--device` and `--compute-dtype` ask for.

    Raises UsageError for a device that this machine does not have. No other device is taken instead.
    """
    devices, why = _devices(device)
    mps = devices[0].type == "mps"
    if compute_dtype == "auto":
        compute_dtype = "float32" if mps else "float64"
        why += "; mps has no float64" if mps else ""
    if mps and compute_dtype == "float64":
        raise UsageError("mps has no float64.", hint="--compute-dtype float32, or --device cpu")
    return ComputeSpec(devices[0], getattr(torch, compute_dtype), why, devices[1:])


def _devices(names: str) -> tuple[tuple[torch.device, ...], str]:
    if names == "auto" and not torch.cuda.is_available():
        return (torch.device("cpu"),), "no CUDA device found"
    if names == "cpu":
        return (torch.device("cpu"),), "as asked"
    from .devices import accelerators

    return accelerators(names)


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32 inside the block; restore the caller's setting afterwards."""
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Use full precision and one torch thread inside the block; restore the caller's thread count afterwards.

    A product that is split over threads has other bits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with full_precision():
            yield
    finally:
        torch.set_num_threads(threads)


def half_ulp(x: Tensor, dtype: str) -> Tensor:
    """Return half the distance between the neighbours of x in a dtype; x is float64."""
    precision, least = GRID[dtype]
    power = x.view(torch.int64).bitwise_and(EXPONENT).view(torch.float64)  # the power of two that is not above |x|
    return power.clamp_(2.0**least, 2.0**1023).mul_(2.0**-precision)


def nearest(x: Tensor, dtype: str) -> Tensor:
    """Return x rounded to the nearest value of a dtype, ties to even, still in float64.

    Rounds by the definition, with a quotient and an integer: for checks, not for merges.
    """
    if dtype == "F64":
        return x
    unit = half_ulp(x, dtype).mul_(2)
    return torch.div(x, unit).round_().mul_(unit)


def ordinal(x: Tensor, dtype: str) -> Tensor:
    """Return the position of each value among the representable numbers of a dtype."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[TORCH[dtype].itemsize]
    bits = x.to(TORCH[dtype]).view(kind).long()
    return torch.where(bits < 0, -(bits & torch.iinfo(kind).max), bits)


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
    """Read some rows of a stored tensor's matrix, in the stored dtype; rows of a coded tensor in float64."""
    if tensor.coded:
        from .decoding import decoded_rows

        return decoded_rows(reader, tensor, rows)
    if tensor.is_view:
        from .view_reading import show

        return show(tensor, rows, range(tensor.matrix[1]), partial(read_rows, reader))
    width = tensor.matrix[1]
    if isinstance(rows, range) and rows.step == 1:
        return _read(reader, tensor, rows.start * width, len(rows) * width).view(len(rows), width)
    if rows:
        first, last = min(rows), max(rows) + 1
        if len(rows) < last - first <= NEAR_BYTES // max(1, width * tensor.itemsize):
            near = _read(reader, tensor, first * width, (last - first) * width).view(last - first, width)
            return near[[row - first for row in rows]]
    runs = [(start * width, count * width) for start, count in _runs(rows)]
    return _gather(reader, tensor, runs).view(len(rows), width)


def read_columns(reader: Reader, tensor: StoredTensor, columns: Sequence[int]) -> Tensor:
    """Read some columns of a stored tensor's matrix, in the stored dtype."""
    if tensor.is_view:
        from .view_reading import show

        return show(tensor, range(tensor.matrix[0]), columns, partial(read_rows, reader))
    height, width = tensor.matrix
    runs = [(row * width + start, count) for row in range(height) for start, count in _runs(columns)]
    return _gather(reader, tensor, runs).view(height, len(columns))


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, count) of each run of neighbours."""
    if isinstance(numbers, range) and numbers.step == 1:
        return [(numbers.start, len(numbers))]
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _read(reader: Reader, tensor: StoredTensor, first: int, number: int) -> Tensor:
    """Read so many neighbouring elements into a flat tensor."""
    size = tensor.itemsize
    data = bytearray(size * number)
    reader.read(tensor.path, tensor.start + first * size, memoryview(data))
    return _numbers(data, tensor)


def _gather(reader: Reader, tensor: StoredTensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Read runs of elements, each given by (first, count), into one flat tensor."""
    size = tensor.itemsize
    data = bytearray(size * sum(number for _, number in runs))
    reader.gather(tensor.path, [(tensor.start + first * size, number * size) for first, number in runs], data)
    return _numbers(data, tensor)


def _numbers(data: bytearray, tensor: StoredTensor) -> Tensor:
    dtype = TORCH.get(tensor.dtype) or PLACES[tensor.dtype]
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def scan_adapter(adapter: Adapter) -> dict[str, str]:
    """Return the xxh3-128 of each of an adapter's files, by name.

    Raises NumericalError, naming every tensor that holds NaN or Inf.
    """
    hashes = {path.name: xxh3(path) for path in adapter.files}
    with closing(Reader()) as reader:
        doubtful = list(adapter.tensors.values())
        if len(doubtful) > MANY:
            from .scanning import in_doubt

            doubtful = in_doubt(doubtful, reader, holds_numbers)
        damaged = [each for each in doubtful if not all(holds_numbers(p, each.dtype) for p in reader.pieces(each))]
    if damaged:
        raise NumericalError(
            f"The adapter {adapter.source.name} is damaged.",
            faults=[Fault(tensor.name, "holds NaN or Inf") for tensor in damaged],
        )
    return hashes


def holds_numbers(piece: memoryview, dtype: str) -> bool:
    """Return True if no element is NaN or infinite, in dtypes that have such values."""
    return dtype not in FLOATS or maths.all_finite(torch.frombuffer(piece, dtype=TORCH[dtype]))


def doubt_zeros(adapter: Adapter) -> str | None:
    """Return a warning if every lora_B has numbers in the same share of its rows only, all others being zero.

    Modules that are zero as a whole were not trained. The first module that has another share ends the search.
    """
    parts: list[int] = []
    with closing(Reader()) as reader:
        for change in adapter.changes:
            if not (low := low_rank(change.update)):
                continue
            B = low.B
            raw = torch.frombuffer(bytearray().join(reader.pieces(B)), dtype=TORCH[B.dtype])
            rows = raw.view(B.shape[0], -1).ne(0).any(dim=1).nonzero().flatten()
            if not len(rows):
                continue
            parts.append(round(B.shape[0] / len(rows)))
            in_one_run = int(rows[-1] - rows[0]) + 1 == len(rows)
            if parts[-1] not in PARTS or parts[-1] != parts[0] or not in_one_run:
                return None
    if len(parts) < 2:
        return None
    return (
        f"{parts[0] - 1}/{parts[0]} of the rows of every lora_B of {adapter.source.name} are exactly zero: "
        "a ZeRO-3 save of one rank looks like that"
    )
