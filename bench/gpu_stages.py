"""Time each stage of a block on a device, and a plain loop that moves the same bytes without arithmetic."""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

from dora_convert.engine.precision import as_bytes, exact_arithmetic
from dora_convert.maths import lora as maths
from dora_convert.plan.large_blocks import LargeItem

ROUNDS = 7
PIECE = 1 << 20
"""Bytes of a write, as the shards' writer has them."""


def median(work: Callable[[], Any], device: str, rounds: int = ROUNDS) -> float:
    """Return the median seconds of some work, the device's part included."""
    found = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def time_stages(device: str, work: Path, table: Any, scale: int) -> None:
    """Add the rate of each stage of a block, one thread, in GB/s of bf16."""
    sizes = {
        f"2^{size.bit_length() - 1}": size for size in (LargeItem.block_elements // scale**2, (1 << 19) // scale**2)
    }
    table.section("Stages of a block, one thread, GB/s of bf16", *(f"{name} elements" for name in sizes))
    with exact_arithmetic():
        found = [stages_of(size, device, work) for size in sizes.values()]
    for stage in found[0]:
        table.row(stage, *(f"{rates[stage]:.2f}" for rates in found))


def stages_of(size: int, device: str, work: Path) -> dict[str, float]:
    """Return the rate of each stage for a block of so many elements."""
    cuda, columns = device.startswith("cuda"), min(4096, size)
    rows, rank, nbytes = size // columns, 16, 2 * size
    host = (torch.randn(rows, columns) * 0.02).bfloat16()
    host = host.pin_memory() if cuda else host
    out = torch.empty_like(host, pin_memory=cuda)
    single, m = torch.empty(rows, columns, device=device), torch.rand(rows, dtype=torch.float64, device=device)
    raw, rounded = host.to(device), torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    W, A, B = (
        torch.randn(shape, dtype=torch.float64, device=device)
        for shape in ((rows, columns), (rank, columns), (rows, rank))
    )
    norms = maths.norms(W, 1)
    path, view = work / "block.bin", as_bytes(out)
    path.write_bytes(bytes(view))
    descriptor = os.open(path, os.O_RDWR)
    stages = {
        "read, page cache → host": lambda: os.preadv(descriptor, [view], 0),
        "host → device": lambda: raw.copy_(host, non_blocking=True),
        "bf16 → float64": lambda: W.copy_(raw),
        "product, rank 16": lambda: maths.add_low_rank_(W, B, A, 1e-9),
        "norms": lambda: maths.norms(W, 1),
        "scale": lambda: maths.rescale_(W, norms, norms, 1),
        "rounding": lambda: maths.round_to(W, rounded, single),
        "search for NaN": lambda: torch.isfinite(rounded).all(),
        "device → host": lambda: out.copy_(rounded, non_blocking=True),
        "xxh3-128": lambda: xxhash.xxh3_128(view).digest(),
        "write, host → page cache": lambda: write(descriptor, view, 0),
    }
    rates = {name: nbytes / median(stage, device) / 1e9 for name, stage in stages.items()}
    on_device = [
        "host → device",
        "bf16 → float64",
        "product, rank 16",
        "norms",
        "scale",
        "rounding",
        "search for NaN",
        "device → host",
    ]
    rates["all on the device, one after another"] = (
        nbytes / median(lambda: [stages[name]() for name in on_device], device) / 1e9
    )
    os.close(descriptor)
    path.unlink()
    del m
    return rates


def write(descriptor: int, view: memoryview, offset: int) -> None:
    for start in range(0, len(view), PIECE):
        os.pwrite(descriptor, view[start : start + PIECE], offset + start)


def time_plain_loop(device: str, base: Path, work: Path, table: Any, rounds: int) -> float:
    """Add the seconds of a loop that moves the base's bytes over the device; return the least."""
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    table.section(f"Plain loop over {total / 1e9:.2f} GB: read → device → host → write, fsync", "s", "GB/s")
    least = float("inf")
    for block, threads in itertools.product((16 << 20, 1 << 20), (1, 4, 8)):
        seconds = statistics.median(plain_loop(device, base, work / "plain", block, threads) for _ in range(rounds))
        table.row(f"blocks of {block >> 20} MiB, {threads} threads", f"{seconds:.2f}", f"{total / seconds / 1e9:.2f}")
        least = min(least, seconds)
    return least


def plain_loop(device: str, base: Path, out: Path, block: int, threads: int) -> float:
    """Return the seconds of one run."""
    files = sorted(base.glob("*.safetensors"))
    out.mkdir(exist_ok=True)
    jobs = iter(
        [(number, offset) for number, file in enumerate(files) for offset in range(0, file.stat().st_size, block)]
    )
    lock, cuda = threading.Lock(), device.startswith("cuda")
    inputs = [os.open(file, os.O_RDONLY) for file in files]
    started = time.perf_counter()
    outputs = [os.open(out / file.name, os.O_RDWR | os.O_CREAT) for file in files]

    def move() -> None:
        host = torch.empty(block, dtype=torch.uint8, pin_memory=cuda)
        there, view = torch.empty(block, dtype=torch.uint8, device=device), as_bytes(host)
        stream = torch.cuda.Stream(device) if cuda else None
        while job := take(jobs, lock):
            number, offset = job
            length = os.preadv(inputs[number], [view], offset)
            with torch.cuda.stream(stream):
                there[:length].copy_(host[:length], non_blocking=True)
                host[:length].copy_(there[:length], non_blocking=True)
            if stream:
                stream.synchronize()
            write(outputs[number], view[:length], offset)

    workers = [threading.Thread(target=move) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for descriptor in outputs:
        os.fsync(descriptor)
    seconds = time.perf_counter() - started
    for descriptor in (*inputs, *outputs):
        os.close(descriptor)
    for file in files:
        (out / file.name).unlink()
    return seconds


def take(jobs: Any, lock: threading.Lock) -> Any:
    with lock:
        return next(jobs, None)
