"""extract's arithmetic: which tensors of two checkpoints differ, and the factors of what fine-tuning did to one weight."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from . import maths
from .blocks import spans
from .craft import Made, rounded
from .errors import NumericalError
from .factoring import Factors, squared, truncated_svd
from .factoring_dora import extract_dora
from .lane import Lane
from .pairs import Pair
from .precision import TORCH
from .rows import read_rows
from .stored import BITS, FLOATS, Reader, Stored


def differing(before: Mapping[str, Stored], after: Mapping[str, Stored]) -> set[str]:
    """The names under which two checkpoints hold other values; of two dtypes, in the coarser one."""
    with closing(Reader()) as reader:
        return {
            name
            for name, tensor in after.items()
            if name in before and not _same(before[name], tensor, reader)
        }


def _same(one: Stored, other: Stored, reader: Reader) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype or not {one.dtype, other.dtype} <= set(FLOATS):
        return one.same_bytes(other)
    coarse = TORCH[min(one.dtype, other.dtype, key=lambda dtype: (BITS[dtype], dtype))]
    return all(
        torch.equal(*(read_rows(reader, tensor, range(*span)).to(coarse) for tensor in (one, other)))
        for span in spans(*one.matrix)
    )


def extract_module(
    job: Pair, lane: Lane, *, kind: str, goal: Mapping[str, Any], exact: bool, single: bool, dtype: str | None
) -> Made:
    """Factors of TUNED − BASE (and m, for DoRA), and what they lose of it; none where nothing differs after all."""
    held = torch.float32 if single else lane.choice.compute
    W, tuned = _matrix(job.base, lane, held, job), _matrix(job.tuned, lane, held, job)
    stored, wide = TORCH[dtype or "F32"], lane.choice.compute
    facts: dict[str, Any] = {}
    if kind == "dora":
        found = extract_dora(W, tuned, exact=exact, **goal)
        B, A = found.B, found.A
        facts = {"converged": found.converged, "steps": found.steps}
        if found.rank:
            facts["lora_error"] = truncated_svd(_change(W, tuned, wide), rank=found.rank, exact=exact).error
    else:
        D = _change(W, tuned, wide)
        lora = truncated_svd(D, exact=exact, **goal)
        B, A = lora.B, lora.A
        facts = _ranks(lora)
    B, A = (rounded(x.to(wide), stored, job.name) for x in (B, A))
    facts |= {"rank": A.shape[0]}
    m, lost, change = _measured(W, tuned, B.to(wide), A.to(wide), decomposed=kind == "dora")
    facts |= {"change": change, "lost": lost}
    if not A.shape[0]:
        return Made({}, facts)
    return Made({"A": A, "B": B, **({"m": m.float()} if kind == "dora" else {})}, facts)


def _ranks(found: Factors) -> dict[str, Any]:
    return {
        "one_percent": found.rank_for(0.01), "one_permille": found.rank_for(0.001), "known": len(found.S),
    }  # fmt: skip


def _matrix(stored: Stored, lane: Lane, dtype: torch.dtype, job: Pair) -> Tensor:
    """A weight as (out, in), in a dtype that its values fit."""
    matrix = torch.empty(stored.matrix, dtype=dtype, device=lane.choice.device)
    for start, stop in spans(*stored.matrix):
        matrix[start:stop] = lane.raw(stored, start, stop).to(lane.choice.device)
    if not maths.all_finite(matrix):
        raise NumericalError(
            f"{stored.name} of {stored.path.name} holds NaN or Inf.", hint="the file is damaged"
        )
    return matrix.T if job.transposed else matrix


def _change(W: Tensor, tuned: Tensor, wide: torch.dtype) -> Tensor:
    """TUNED − BASE: subtracted in the compute dtype, and held in theirs."""
    D = torch.empty_like(W)
    for start, stop in spans(*W.shape):
        D[start:stop] = tuned[start:stop].to(wide) - W[start:stop].to(wide)
    return D


def _measured(
    W: Tensor, tuned: Tensor, B: Tensor, A: Tensor, *, decomposed: bool
) -> tuple[Tensor, float, float]:
    """m for the factors as they are stored, by least squares: ⟨W', V⟩/‖V‖; what is lost, squared, and ‖W' − W‖²."""
    found, lost, change = [], 0.0, 0.0
    for start, stop in spans(*W.shape):
        before, after = W[start:stop].to(B), tuned[start:stop].to(B)
        change += squared(after - before)
        V = before + B[start:stop] @ A
        if decomposed:
            n = maths.norms(V, 1)
            m = ((after * V).sum(1) / n).nan_to_num(0.0).float()
            found.append(m)
            V = maths.rescale_(V, m.to(B), n, axis=1).nan_to_num(0.0)
        lost += squared(after - V)
    return torch.cat(found) if decomposed else B.new_empty(0), lost, change
