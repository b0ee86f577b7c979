"""Find the tensors in which two checkpoints differ, and fit the factors of one weight's change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..engine.device_buffers import DeviceBuffers
from ..engine.precision import TORCH, read_rows
from ..errors import NumericalError
from ..maths import lora as maths
from ..maths.dora_fit import extract_dora
from ..maths.svd import compared, truncated_svd
from ..storage.reader import Reader, spans
from ..storage.safetensors import BITS, FLOATS, StoredTensor
from .compress import ranks_for
from .pairs import Pair
from .run import Fitted, rounded


def differing(both: Mapping[str, tuple[StoredTensor, StoredTensor]], reader: Reader) -> set[str]:
    """Return the names of tensors that differ; tensors of two dtypes are compared in the coarser one."""
    names = set()
    for name, (before, after) in both.items():
        if not _same(before, after, reader):
            names.add(name)
        reader.done(name)
    return names


def _same(one: StoredTensor, other: StoredTensor, reader: Reader) -> bool:
    """Return True if two tensors hold the same values."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype or not {one.dtype, other.dtype} <= set(FLOATS):
        return reader.same_bytes(one, other)
    coarse = TORCH[min(one.dtype, other.dtype, key=lambda dtype: (BITS[dtype], dtype))]
    return all(
        torch.equal(*(read_rows(reader, tensor, range(*span)).to(coarse) for tensor in (one, other)))
        for span in spans(*one.matrix)
    )


def extract_module(
    job: Pair,
    buffers: DeviceBuffers,
    *,
    kind: str,
    goal: Mapping[str, Any],
    exact: bool,
    single: bool,
    dtype: str | None,
) -> Fitted:
    """Return the factors of TUNED − BASE (and m, for a DoRA), and their loss; none for no difference."""
    working, wide = torch.float32 if single else buffers.spec.compute, buffers.spec.compute
    if kind == "lora":
        D = _difference(job, buffers, working)
        factors = truncated_svd(D, exact=exact, **goal)
        B, A = (rounded(x, dtype, job.name) for x in (factors.B, factors.A))
        lost, change = compared(lambda rows: D[rows].to(wide), B.to(wide), A.to(wide))
        facts = {"rank": factors.rank, "change": change, "lost": lost, **ranks_for(factors)}
        return Fitted({"A": A, "B": B} if factors.rank else {}, facts)
    W, tuned = (_matrix(stored, buffers, working, transposed=job.transposed) for stored in job.inputs)
    dora = extract_dora(W, tuned, exact=exact, store=lambda x: rounded(x, dtype, job.name), **goal)
    lost = dora.delta_error * dora.change
    facts = {"rank": dora.rank, "change": dora.change * dora.change, "lost": lost * lost}
    facts |= {"converged": dora.converged, "steps": dora.steps}
    if not dora.rank:
        return Fitted({}, facts)
    del W, tuned
    facts["lora_error"] = truncated_svd(_difference(job, buffers, working), rank=dora.rank, exact=exact).error
    return Fitted({"A": dora.A, "B": dora.B, "m": dora.m.float()}, facts)


def _matrix(stored: StoredTensor, buffers: DeviceBuffers, dtype: torch.dtype, *, transposed: bool) -> Tensor:
    """Return a weight as (out, in); NumericalError for NaN and Inf."""
    matrix = torch.empty(stored.matrix, dtype=dtype, device=buffers.spec.device)
    for start, stop in spans(*stored.matrix):
        matrix[start:stop] = buffers.raw(stored, start, stop).to(buffers.spec.device)
    if not maths.all_finite(matrix):
        raise NumericalError(f"{stored.name} of {stored.path.name} holds NaN or Inf.", hint="the file is damaged")
    return matrix.T if transposed else matrix


def _difference(job: Pair, buffers: DeviceBuffers, dtype: torch.dtype) -> Tensor:
    """Return TUNED − BASE as (out, in): subtracted in the compute dtype, then rounded to `dtype`."""
    base, tuned = job.inputs
    D = torch.empty(base.matrix, dtype=dtype, device=buffers.spec.device)
    for start, stop in spans(*base.matrix):
        W = buffers.computed(buffers.raw(base, start, stop))
        D[start:stop] = buffers.computed(buffers.raw(tuned, start, stop)) - W
    if not maths.all_finite(D):
        raise NumericalError(f"{job.name} holds NaN or Inf in BASE or TUNED.", hint="a file is damaged")
    return D.T if job.transposed else D
