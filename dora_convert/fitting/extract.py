"""Find the tensors in which two checkpoints differ, and fit the factors of one weight's change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from .model_weights import WeightPiece
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
    coded = one.coded or other.coded
    if not coded and (one.dtype == other.dtype or not {one.dtype, other.dtype} <= set(FLOATS)):
        return reader.same_bytes(one, other)
    coarse = TORCH[min(one.dtype, other.dtype, key=lambda dtype: (BITS[dtype], dtype))]

    def values(tensor: StoredTensor, span: tuple[int, int]) -> Tensor:
        x = read_rows(reader, tensor, range(*span))
        return maths.round_to(x, torch.empty(x.shape, dtype=coarse)) if tensor.coded else x.to(coarse)

    return all(torch.equal(values(one, span), values(other, span)) for span in spans(*one.matrix))


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
        found = []
        for number in range(len(job.before.stacks)):
            D = _difference(job, number, buffers, working)
            found.append(_lora(D, job.name, wide, goal=goal, exact=exact, dtype=dtype))
        return found[0] if not job.experts else _of_experts(found)
    W, tuned = (_matrix(weight.stacks[0], buffers, working) for weight in (job.before, job.after))
    dora = extract_dora(W, tuned, exact=exact, store=lambda x: rounded(x, dtype, job.name), **goal)
    facts = {"rank": dora.rank, "change": dora.change**2, "lost": (dora.delta_error * dora.change) ** 2}
    facts |= {"converged": dora.converged, "steps": dora.steps}
    if not dora.rank:
        return Fitted({}, facts)
    del W, tuned
    facts["lora_error"] = truncated_svd(_difference(job, 0, buffers, working), rank=dora.rank, exact=exact).error
    return Fitted({"A": dora.A, "B": dora.B, "m": dora.m.float()}, facts)


def _lora(
    D: Tensor, name: str, wide: torch.dtype, *, goal: Mapping[str, Any], exact: bool, dtype: str | None
) -> Fitted:
    """Return the factors of a difference (out, in), and their loss."""
    factors = truncated_svd(D, exact=exact, **goal)
    B, A = (rounded(x, dtype, name) for x in (factors.B, factors.A))
    lost, change = compared(lambda rows: D[rows].to(wide), B.to(wide), A.to(wide))
    facts = {"rank": factors.rank, "change": change, "lost": lost, **ranks_for(factors)}
    return Fitted({"A": A, "B": B} if factors.rank else {}, facts)


def _of_experts(found: Sequence[Fitted]) -> Fitted:
    """Return the factors of a stack of experts: A (experts·r, in), and B (out, r·experts) with the expert fastest."""
    every = [each.facts for each in found]
    rank = max(facts["rank"] for facts in every)
    facts = {"rank": rank} | {name: sum(each[name] for each in every) for name in ("change", "lost")}
    for name in ("one_percent", "one_permille", "known"):
        ranks = [each[name] for each in every]
        facts[name] = None if None in ranks else max(ranks)
    if not rank:
        return Fitted({}, facts)
    some = next(each.tensors for each in found if each.tensors)
    A = some["A"].new_zeros(len(found), rank, some["A"].shape[1])
    B = some["B"].new_zeros(len(some["B"]), rank, len(found))
    for number, each in enumerate(found):
        if each.tensors:
            A[number, : each.facts["rank"]] = each.tensors["A"]
            B[:, : each.facts["rank"], number] = each.tensors["B"]
    return Fitted({"A": A.flatten(0, 1), "B": B.flatten(1)}, facts)


def _matrix(stack: Sequence[WeightPiece], buffers: DeviceBuffers, dtype: torch.dtype) -> Tensor:
    """Return a weight as (out, in); NumericalError for NaN and Inf."""
    parts = []
    for piece in stack:
        stored = piece.tensor
        matrix = torch.empty(stored.matrix, dtype=dtype, device=buffers.spec.device)
        for start, stop in spans(*stored.matrix):
            matrix[start:stop] = buffers.raw(stored, start, stop).to(buffers.spec.device)
        if not maths.all_finite(matrix):
            raise NumericalError(f"{stored.name} of {stored.path.name} holds NaN or Inf.", hint="the file is damaged")
        parts.append(matrix.T if piece.turned else matrix)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _difference(job: Pair, number: int, buffers: DeviceBuffers, dtype: torch.dtype) -> Tensor:
    """Return TUNED − BASE of one expert as (out, in): subtracted in the compute dtype, then rounded to `dtype`."""
    parts = []
    for before, after in zip(job.before.stacks[number], job.after.stacks[number], strict=True):
        base, tuned = before.tensor, after.tensor
        D = torch.empty(base.matrix, dtype=dtype, device=buffers.spec.device)
        for start, stop in spans(*base.matrix):
            W = buffers.computed(buffers.raw(base, start, stop))
            D[start:stop] = buffers.computed(buffers.raw(tuned, start, stop)) - W
        if not maths.all_finite(D):
            raise NumericalError(f"{job.name} holds NaN or Inf in BASE or TUNED.", hint="a file is damaged")
        parts.append(D.T if before.turned else D)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
