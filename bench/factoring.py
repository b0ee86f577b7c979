"""Compare the time and the error of low-rank factors with LAPACK's SVD.

    python factoring.py [SIZE [RANK [ROUNDS]]]

All arithmetic is in float32, and all figures are medians of interleaved rounds. Two spectra are measured. The
hard one is ΔW = (D − I)W + D·BA of a trained DoRA, which falls slowly; the other halves with every eighth
value. The script then extracts the same DoRA from W and W', and times products with ΔW by its structure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from dora_convert.maths.dora_fit import extract_dora
from dora_convert.maths.svd import truncated_svd


def with_spectrum(S: Tensor) -> Tensor:
    U, V = (torch.linalg.qr(torch.randn(len(S), len(S))).Q for _ in range(2))
    return (U * S) @ V.T


def timed(rounds: int, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each run; the runs take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in times.items()}


def svd(name: str, D: Tensor, rank: int, rounds: int) -> None:
    S = torch.linalg.svdvals(D).double()
    took = timed(
        rounds, {"full": lambda: torch.linalg.svd(D, full_matrices=False), "ours": lambda: truncated_svd(D, rank=rank)}
    )
    best, ours = float(S[rank:].norm() / S.norm()), truncated_svd(D, rank=rank).error
    print(
        f"{name:14} full SVD {took['full']:7.2f} s, ours {took['ours']:6.2f} s, "
        f"{took['full'] / took['ours']:5.1f} times faster; "
        f"error {ours:.6f}, best {best:.6f}, {ours / best - 1:.1e} above"
    )


def main(size: int = 4096, rank: int = 32, rounds: int = 3) -> None:
    torch.manual_seed(0)
    number = torch.arange(1.0, size + 1)
    W = 0.03 * size**0.5 * with_spectrum(number**-0.4)
    d = 1 + 0.03 * torch.randn(size, 1)
    B, A = torch.randn(size, rank // 2), torch.randn(rank // 2, size)
    B *= 0.1 * W.norm() / (B @ A).norm()
    delta = (d - 1) * W + d * (B @ A)
    print(f"{size} × {size}, float32, {torch.get_num_threads()} threads")
    svd("trained DoRA", delta, rank, rounds)
    svd("fast spectrum", with_spectrum(0.5 ** (number / 8)), rank, rounds)

    tuned = W + delta
    start = time.perf_counter()
    found = extract_dora(W, tuned, rank=rank // 2)
    took = time.perf_counter() - start
    print(
        f"extract_dora, rank {rank // 2}: {took:.1f} s, {found.steps} steps; "
        f"error of W' {found.error:.1e}, of ΔW {found.delta_error:.1e}, "
        f"a LoRA's {truncated_svd(delta, rank=rank // 2).error:.3f}"
    )
    X = torch.randn(size, rank + 10)
    took_by = timed(20, {"dense": lambda: delta @ X, "structured": lambda: (d - 1) * (W @ X) + d * (B @ (A @ X))})
    print(
        f"a product with ΔW: dense {took_by['dense'] * 1e3:.1f} ms, by structure {took_by['structured'] * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
