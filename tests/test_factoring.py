"""Low-rank factors against torch.linalg in float64, and DoRAs that are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dora_convert.adapters import factoring, factoring_dora, factoring_scales
from dora_convert.adapters.factoring import Goal, relative_error, resize, truncated_svd
from dora_convert.adapters.factoring_dora import extract_dora

SHAPES = [(96, 40), (40, 96), (24, 40)]


def weight(out: int, width: int, seed: int = 0, decay: float = 0.4) -> Tensor:
    """A float64 matrix whose singular values fall as those of trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    least = min(out, width)
    U, V = (
        torch.linalg.qr(torch.randn(size, least, generator=generator, dtype=torch.float64)).Q
        for size in (out, width)
    )
    return 0.5 * (U * torch.arange(1.0, least + 1, dtype=torch.float64) ** -decay) @ V.T


def dora(W: Tensor, rank: int, seed: int = 0, strength: float = 0.1, spread: float = 0.05) -> Tensor:
    """W' of a DoRA by definition, every seventh row flipped: BA is `strength` of W, m is off by `spread`."""
    generator = torch.Generator().manual_seed(seed + 1)
    B, A = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((len(W), rank), (rank, W.shape[1]))
    )
    X = B @ A
    V = W + X * (strength * W.norm() / X.norm())
    m = V.norm(dim=1) * (1 + spread * torch.randn(len(W), generator=generator, dtype=torch.float64))
    m[::7] *= -1
    return (m / V.norm(dim=1))[:, None] * V


def delta(out: int, width: int, rank: int) -> Tensor:
    """ΔW of a DoRA as training leaves it: its singular values fall slowly, as D − I has full rank."""
    W = weight(out, width)
    generator = torch.Generator().manual_seed(3)
    d = 1 + 0.03 * torch.randn(out, 1, generator=generator, dtype=torch.float64)
    B, A = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((out, rank), (rank, width))
    )
    X = B @ A
    return (d - 1) * W + d * X * (0.1 * W.norm() / X.norm())


def left_over(D: Tensor) -> Tensor:
    """The relative errors of the best approximations of rank 0, 1, …: Eckart and Young."""
    S = torch.linalg.svdvals(D.double())
    return torch.tensor([S[rank:].norm() / S.norm() for rank in range(len(S) + 1)])


def error(D: Tensor, found: factoring.Factors) -> float:
    return float((D.double() - found.B.double() @ found.A.double()).norm() / D.double().norm())


@pytest.mark.parametrize("shape", [(700, 576), (576, 1100)], ids=str)
@pytest.mark.parametrize("rank", [8, 16, 32])
def test_large_matrices_are_as_good_as_lapack(shape, rank):
    """The flat spectrum of a trained DoRA, which is hard for random starts: within 1 % of the best at r, 2r and 4r."""
    D = delta(*shape, 8).float()
    found = truncated_svd(D, rank=rank)
    assert not found.exact
    assert found.rank == rank
    assert found.error == pytest.approx(error(D, found), rel=1e-4)
    assert found.error < 1.01 * left_over(D)[rank]


def test_large_matrices_of_a_fast_spectrum():
    """Where errors are small, they are just as near the best."""
    D = weight(700, 576, decay=4.0)
    best = left_over(D)
    for rank in (4, 40):
        assert truncated_svd(D, rank=rank).error == pytest.approx(best[rank].item(), rel=1e-3)


@pytest.mark.parametrize("allowed", [0.6, 0.3])
def test_least_rank_of_large_matrices(allowed):
    """An error asked for is met, as measured, by the least rank or one more."""
    D = delta(700, 576, 8)
    want = int((left_over(D) > allowed).sum())
    found = truncated_svd(D, max_error=allowed)
    assert error(D, found) <= allowed
    assert want <= found.rank <= want + 1


def test_random_start_is_given_up_where_most_is_needed():
    """Half of the singular values and more: by LAPACK, at the very least rank."""
    D = delta(600, 576, 8)
    found = truncated_svd(D, max_error=0.05)
    assert found.exact
    assert found.rank == int((left_over(D) > 0.05).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_is_the_matrix(shape):
    """At min(out, in) in float32 the error is under 1e-5; a larger rank is lowered to it."""
    D = delta(*shape, 4).float()
    found = truncated_svd(D, rank=1000)
    assert found.rank == min(shape)
    assert error(D, found) < 1e-5


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(0, 8),
    st.integers(1, 40),
    st.integers(0, 3),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_and_rank(out, width, true, rank, seed, exact):
    """min(rank asked for, out, in, the matrix's own rank); the error is the best there is; S is split evenly."""
    generator = torch.Generator().manual_seed(seed)
    D = torch.randn(out, true, generator=generator) @ torch.randn(true, width, generator=generator)
    found = truncated_svd(D, rank=rank, exact=exact)
    own = int(torch.linalg.matrix_rank(D.double(), rtol=1e-5))
    assert found.rank == min(rank, own)
    assert found.B.shape == (out, found.rank)
    assert found.A.shape == (found.rank, width)
    if own:
        assert found.error == pytest.approx(left_over(D)[found.rank].item(), abs=1e-5)
    torch.testing.assert_close(found.B.norm(dim=0), found.A.norm(dim=1))


@given(st.floats(0, 1), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_energy_is_a_share_of_squares(energy, seed):
    """The least rank whose singular values' squares make up that share."""
    D = weight(24, 40, seed)
    S = torch.linalg.svdvals(D)
    found = truncated_svd(D, energy=energy)
    kept = S[: found.rank].square().sum() / S.square().sum()
    assert kept >= energy - 1e-12
    if found.rank:
        assert S[: found.rank - 1].square().sum() / S.square().sum() < energy + 1e-12


def test_rank_for_an_error():
    """From all singular values it is exact; from some, what lies beyond is None."""
    D = delta(600, 576, 8)
    some, every, best = truncated_svd(D, rank=16), truncated_svd(D, rank=16, exact=True), left_over(D)
    for allowed in (0.5, 0.1, 0.01, 0.001):
        want = int((best > allowed).sum())
        assert every.rank_for(allowed) == want
        got = some.rank_for(allowed)
        assert (want > len(some.S)) if got is None else (want <= got <= want + 1)


@pytest.mark.parametrize("shape", [(24, 40), (600, 576)], ids=str)
def test_nothing_has_rank_0(shape):
    """Zeros have factors without columns."""
    found = truncated_svd(torch.zeros(shape), max_error=0.1)
    assert (found.rank, found.error) == (0, 0.0)
    assert found.B.shape == (shape[0], 0)
    assert resize(torch.zeros(24, 3), torch.ones(3, 40), rank=2).rank == 0


def test_numerical_rank_of_large_matrices():
    """A product's own rank is found through float32's rounding."""
    D = (torch.randn(700, 5, dtype=torch.float64) @ torch.randn(5, 576, dtype=torch.float64)).float()
    for goal in ({"rank": 24}, {"max_error": 1e-9}, {"energy": 1.0}):
        found = truncated_svd(D, **goal)
        assert found.rank == 5
        assert error(D, found) < 1e-6


@pytest.mark.parametrize(
    "goal",
    [
        {},
        {"rank": 2, "energy": 0.5},
        {"rank": 0},
        {"energy": 1.5},
        {"max_error": -0.1},
        {"max_error": float("nan")},
    ],
)
def test_goals_that_nothing_reaches(goal):
    """One of the three, and a possible one."""
    with pytest.raises(ValueError, match=r"rank|energy|max_error"):
        Goal.of(**goal)


def test_same_input_same_bits():
    """Twice the same, and torch's own random numbers go on as if nothing had been."""
    D, state = delta(600, 576, 8).float(), torch.get_rng_state()
    first, second = truncated_svd(D, rank=8), truncated_svd(D, rank=8)
    W = weight(24, 40)
    one, other = (extract_dora(W, dora(W, 4), rank=2) for _ in range(2))
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.A, second.A)
    assert torch.equal(one.B, other.B)
    assert torch.equal(one.m, other.m)
    assert torch.equal(state, torch.get_rng_state())


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 24), st.integers(1, 24), st.floats(0.1, 4))
@settings(max_examples=100, deadline=None)
def test_resizing_is_the_svd_of_the_product(out, width, r, rank, s):
    """Factors larger than the matrix too: the best error, of s·BA, in the dtype given."""
    generator = torch.Generator().manual_seed(out * width + r)
    B, A = torch.randn(out, r, generator=generator), torch.randn(r, width, generator=generator)
    D = s * B.double() @ A.double()
    found = resize(B, A, s, rank=rank)
    assert found.B.dtype == torch.float32
    assert found.rank <= min(rank, out, width, r)
    assert error(D, found) == pytest.approx(left_over(D)[min(rank, out, width)].item(), abs=1e-6)
    assert found.error == pytest.approx(error(D, found), abs=1e-7)


def test_resizing_by_error():
    """The least rank that reaches it."""
    B, A = torch.randn(40, 16, dtype=torch.float64), torch.randn(16, 96, dtype=torch.float64)
    best = left_over(B @ A)
    for rank in (3, 9, 16):
        found = resize(B, A, max_error=best[rank].item() + 1e-9)
        assert found.rank == rank
        assert found.exact


def test_errors_are_measured_across_blocks(monkeypatch):
    """However many rows make a block."""
    monkeypatch.setattr(factoring, "BLOCK", 7 * 40)
    D, B, A = torch.randn(24, 40), torch.randn(24, 3), torch.randn(3, 40)
    want = (D - B @ A).double().norm() / D.double().norm()
    assert relative_error(lambda rows: D[rows], B, A) == pytest.approx(want.item(), rel=1e-6)


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
    assert found.delta_error == pytest.approx(
        found.error * float(tuned.norm() / (tuned - W).norm()), rel=1e-3
    )
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
    """What the test above is for: the search from the first start alone ends elsewhere."""
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
