"""Where to compute and in what: each choice comes with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import UsageError

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""torch's dtypes by their safetensors names, for all dtypes that arithmetic is done on."""


@dataclass(frozen=True)
class ComputeSpec:
    """A device, the dtype that arithmetic is done in, and why."""

    device: torch.device
    compute: torch.dtype
    reason: str

    @property
    def compute_name(self) -> str:
        """The compute dtype as users write it, such as float64."""
        return str(self.compute).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.device}, {self.compute_name}: {self.reason}"


def choose(device: str = "auto", compute_dtype: str = "auto") -> ComputeSpec:
    """Settle `--device` and `--compute-dtype`.

    Raises UsageError for a device that is not there: asking for one is never answered with another.
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
            return torch.device("cuda", torch.cuda.current_device()), "a CUDA device is there"
        return torch.device("cpu"), "no CUDA device is there"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name.partition(":")[2] or 0)
        if index >= count:
            raise UsageError(f"--device {name}: this machine has {count} usable CUDA devices.")
        return torch.device("cuda", index), "as asked"
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has none.")
    return torch.device(name), "as asked"


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32 while the block runs, and the caller's setting afterwards."""
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Full-precision products, one torch thread each, while the block runs, and the caller's thread count afterwards.

    A product split over threads has other bits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with full_precision():
            yield
    finally:
        torch.set_num_threads(threads)
