"""Magnitudes and factors of a DoRA found again from weights alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dora_convert.maths import dora_fit as factoring_dora
from dora_convert.maths import row_scales as factoring_scales
from dora_convert.maths.dora_fit import extract_dora
from dora_convert.maths.svd import truncated_svd

from .test_factoring import SHAPES, dora, left_over, weight


def rebuilt(W: Tensor, found: factoring_dora.DoraFactors) -> Tensor:
    V = W.double() + found.B.double() @ found.A.double()
    return found.m.double()[:, None] * V / V.norm(dim=1, keepdim=True)


def distance(W: Tensor, tuned: Tensor, found: factoring_dora.DoraFactors) -> float:
    return float((rebuilt(W, found) - tuned.double()).norm() / tuned.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [2, 8, 16])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 576)], ids=str)
def test_a_merged_dora_is_found_again(shape, rank, dtype):
    """From weights alone, flipped rows too; an SVD of the same rank is far from it."""
    W = weight(*shape).to(dtype)
    tuned = dora(W.double(), rank).to(dtype)
    found = extract_dora(W, tuned, rank=rank)
    assert found.rank == rank
    assert found.converged
    assert distance(W, tuned, found) < (1e-6 if dtype == torch.float32 else 1e-12)
    assert found.error == pytest.approx(distance(W, tuned, found), rel=1e-2, abs=1e-14)
    assert found.delta_error == pytest.approx(found.error * float(tuned.norm() / (tuned - W).norm()), rel=1e-3)
    assert truncated_svd(tuned - W, rank=rank).error > 0.01


def test_a_merged_dora_is_found_in_float32_arithmetic(monkeypatch):
    """As large matrices are computed."""
    monkeypatch.setattr(factoring_dora, "SMALL", 0)
    W = weight(300, 576).float()
    tuned = dora(W.double(), 8).float()
    found = extract_dora(W, tuned, rank=8)
    assert distance(W, tuned, found) < 1e-6


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("shape", "rank"), [((12, 16), 8), ((24, 40), 16)], ids=str)
def test_local_minima_are_left(shape, rank, seed):
    """Small matrices of a large rank have some; there, magnitudes off by half, the first start does not always do."""
    W = weight(*shape, seed, decay=0.0)
    tuned = dora(W, rank, seed, spread=0.5)
    assert distance(W, tuned, extract_dora(W, tuned, rank=rank)) < 1e-6


def test_a_start_that_fails_is_followed_by_others():
    """The reason for the test above: the search from the first start alone ends elsewhere."""
    W = weight(12, 16, 5, decay=0.0)
    tuned = dora(W, 8, 5, spread=0.5)
    search = factoring_scales._Search(W, tuned, 8)
    ends = [
        search.run(search.fit(d))[0].loss ** 0.5 / tuned.norm()
        for d in (search.ratio(), torch.ones(12, dtype=torch.float64))
    ]
    assert max(ends) > 1e-4


def test_alternation_is_slower():
    """Scales and factors by turns take over a hundred rounds to 1e-7 where this takes a few steps."""
    W = weight(24, 40)
    tuned = dora(W, 16)
    d = (W * tuned).sum(1) / W.square().sum(1)
    for _ in range(100):
        U, S, Vh = torch.linalg.svd(tuned - d[:, None] * W, full_matrices=False)
        Z = (U[:, :16] * S[:16]) @ Vh[:16]
        d = ((tuned - Z) * W).sum(1) / W.square().sum(1)
    assert S[16:].norm() / tuned.norm() > 1e-7
    found = extract_dora(W, tuned, rank=16)
    assert found.steps < 20
    assert found.error < 1e-10


def test_after_rounding_to_bfloat16_the_error_is_the_rounding():
    """Even where single elements moved by less than their last bit."""
    W = weight(300, 576).bfloat16().double()
    exact = dora(W, 4, strength=0.01, spread=0.003)
    tuned = exact.bfloat16()
    rounding = float((tuned.double() - exact).norm() / exact.norm())
    found = extract_dora(W.float(), tuned.float(), rank=4)
    assert (tuned == W).double().mean() > 0.1
    assert found.error < 1.01 * rounding
    assert float((rebuilt(W, found) - exact).norm() / exact.norm()) < 0.5 * rounding


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_never_worse_than_a_lora(rank):
    """A full fine-tune is nobody's DoRA: the search ends, no farther than the SVD of the same rank."""
    W = weight(96, 40)
    tuned = W + 0.05 * weight(96, 40, 9, decay=0.7)
    found = extract_dora(W, tuned, rank=rank)
    assert found.converged
    assert found.delta_error <= left_over(tuned - W)[rank] * (1 + 1e-9)


def test_scales_are_a_minimum():
    """No scales nearby are better: φ from its definition, by differences in float64."""
    W = weight(24, 40)
    tuned = W + 0.1 * weight(24, 40, 9, decay=0.2)
    d = factoring_scales.find_scales(W, tuned, 4, 0.0).d

    def loss(d: Tensor) -> float:
        return float(torch.linalg.svdvals(tuned - d[:, None] * W)[4:].square().sum())

    for row in range(24):
        for change in (-1e-2, 1e-2):
            nearby = d.clone()
            nearby[row] += change
            assert loss(nearby) > loss(d) * (1 - 1e-6)


def test_a_dora_of_an_error():
    """The least rank is found, and the energy that goes with it."""
    W = weight(96, 40)
    tuned = dora(W, 6)
    for goal in ({"max_error": 1e-4}, {"energy": 1 - 1e-8}):
        found = extract_dora(W, tuned, **goal)
        assert found.rank == 6
        assert found.delta_error < 1e-4
    loose = extract_dora(W, tuned, max_error=0.05)
    assert loose.rank < 6
    assert loose.delta_error <= 0.05


def test_an_error_that_needs_most_of_the_rank():
    """A full fine-tune, to 1 %: met, as measured."""
    W = weight(30, 16)
    tuned = W + 0.05 * weight(30, 16, 9)
    found = extract_dora(W, tuned, max_error=0.01)
    assert found.delta_error <= 0.01
    assert distance(W, tuned, found) == pytest.approx(found.error, rel=1e-6)


def test_rows_of_zeros():
    """A row that became zero, one that was, one that is and stays; every V has a norm, as PEFT divides by it."""
    W = weight(40, 96)
    W[5] = W[7] = 0
    tuned = dora(W, 4)
    tuned[3] = tuned[7] = 0
    found = extract_dora(W, tuned, rank=4)
    assert distance(W, tuned, found) < 1e-6
    assert (W + found.B @ found.A).norm(dim=1).min() > 0
    assert found.m[[3, 7]].abs().max() == 0
    assert found.m[5] != 0


def test_unchanged_rows_and_weights():
    """W itself has rank 0; unchanged rows among others keep their values; scales alone need no factors."""
    W = weight(40, 96)
    same = extract_dora(W, W.clone(), rank=4)
    assert (same.rank, same.error) == (0, 0.0)
    torch.testing.assert_close(same.m, W.norm(dim=1))
    tuned = dora(W, 4)
    tuned[10:30] = W[10:30]
    assert distance(W, tuned, extract_dora(W, tuned, rank=24)) < 1e-6
    scaled = extract_dora(W, W * torch.linspace(0.5, 2, 40, dtype=torch.float64)[:, None], rank=4)
    assert scaled.error < 1e-14
    assert (scaled.rank, scaled.B.abs().max()) == (1, 0)


def test_everything_became_zero():
    """m = 0."""
    W = weight(24, 40)
    found = extract_dora(W, torch.zeros_like(W), rank=4)
    assert found.m.abs().max() == 0
    assert found.error == 0


def test_replaced_rows_do_not_blow_up():
    """A row at right angles to its old self has no scale: B stays within reason, and so does the error."""
    W = weight(40, 96)
    tuned = dora(W, 4)
    tuned[0] = tuned[0] - (tuned[0] @ W[0]) / (W[0] @ W[0]) * W[0]
    found = extract_dora(W, tuned, rank=8)
    assert found.B.isfinite().all()
    assert found.error == pytest.approx(distance(W, tuned, found), abs=1e-9)
    assert found.error < 0.05


@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 20), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_extraction_of_any_shape(out, width, rank, seed):
    """Ranks beyond the matrix too; what is reported is what is there."""
    W = weight(out, width, seed)
    tuned = W + 0.1 * weight(out, width, seed + 7)
    found = extract_dora(W, tuned, rank=rank)
    assert 1 <= found.rank <= min(rank, out, width)
    assert found.error == pytest.approx(distance(W, tuned, found), abs=1e-9)
    assert found.rank < min(out, width) or found.error < 1e-6


def test_no_row_of_v_is_next_to_nothing():
    """A row that B A alone can make has any scale; a huge one would leave V's row to rounding, in PEFT and here."""
    generator = torch.Generator().manual_seed(78)
    W = torch.randn(16, 32, generator=generator) * 0.1
    tuned = W + torch.randn(16, 32, generator=generator) * 0.06
    found = extract_dora(W, tuned, rank=6)
    V = W.double() + found.B.double() @ found.A.double()
    assert (V.norm(dim=1) / W.double().norm(dim=1)).min() > 0.09
    assert found.delta_error < 0.54
