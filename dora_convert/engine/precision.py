"""Choose the device and the dtype of arithmetic, and measure rounding in units in the last place (ulps)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""torch's dtypes by their safetensors names, for all dtypes that arithmetic is done on."""
GRID = {"BF16": (8, -126), "F16": (11, -14), "F32": (24, -126), "F64": (53, -1022)}
"""Precision in bits and the least exponent of each dtype."""


@dataclass(frozen=True)
class ComputeSpec:
    """A device, the dtype of arithmetic, and the reason for the choice."""

    device: torch.device
    compute: torch.dtype
    reason: str

    @property
    def compute_name(self) -> str:
        """The compute dtype as users write it, such as float64."""
        return str(self.compute).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.device}, {self.compute_name} ({self.reason})"


def choose(device: str = "auto", compute_dtype: str = "auto") -> ComputeSpec:
    """Choose the device and the dtype that `--device` and `--compute-dtype` ask for.

    Raises UsageError for a device that this machine does not have. No other device is taken instead.
    """
    where, why = _device(device)
    if compute_dtype == "auto":
        compute_dtype = "float32" if where.type == "mps" else "float64"
        why += "; mps has no float64" if where.type == "mps" else ""
    if where.type == "mps" and compute_dtype == "float64":
        raise UsageError("mps has no float64.", hint="--compute-dtype float32, or --device cpu")
    return ComputeSpec(where, getattr(torch, compute_dtype), why)


def _device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device()), "CUDA device found"
        return torch.device("cpu"), "no CUDA device found"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name.partition(":")[2] or 0)
        if index >= count:
            is_cpu = not (torch.version.cuda or torch.version.hip)
            why = f": torch {torch.__version__} is a CPU build" if is_cpu else ""
            raise UsageError(
                f"--device {name}: this machine has {count} usable CUDA devices{why}.",
                hint="install a build with CUDA: https://pytorch.org/get-started/locally" if is_cpu else None,
            )
        return torch.device("cuda", index), "as asked"
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has no mps device.")
    return torch.device(name), "as asked"


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
    exponent = (x.view(torch.int64) >> 52 & 0x7FF).clamp_(min=least + 1023)  # biased, as float64 stores it
    return (exponent.sub_(precision) << 52).view(torch.float64)


def nearest(x: Tensor, dtype: str) -> Tensor:
    """Return x rounded to the nearest value of a dtype, ties to even, still in float64.

    Rounds by the definition, with a quotient and an integer: for checks, not for merges.
    """
    if dtype == "F64":
        return x
    unit = 2 * half_ulp(x, dtype)
    return torch.round(x / unit).mul_(unit)


def ordinal(x: Tensor, dtype: str) -> Tensor:
    """Return the position of each value among the representable numbers of a dtype."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[TORCH[dtype].itemsize]
    bits = x.to(TORCH[dtype]).view(kind).long()
    return torch.where(bits < 0, -(bits & torch.iinfo(kind).max), bits)
