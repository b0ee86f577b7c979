"""Low-rank factors against torch.linalg in float64, and DoRAs that are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dora_convert.maths import svd as factoring
from dora_convert.maths.dora_fit import extract_dora
from dora_convert.maths.svd import Goal, relative_error, resize, truncated_svd

SHAPES = [(96, 40), (40, 96), (24, 40)]


def weight(out: int, width: int, seed: int = 0, decay: float = 0.4) -> Tensor:
    """A float64 matrix whose singular values fall as those of trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    least = min(out, width)
    U, V = (
        torch.linalg.qr(torch.randn(size, least, generator=generator, dtype=torch.float64)).Q for size in (out, width)
    )
    return 0.5 * (U * torch.arange(1.0, least + 1, dtype=torch.float64) ** -decay) @ V.T


def dora(W: Tensor, rank: int, seed: int = 0, strength: float = 0.1, spread: float = 0.05) -> Tensor:
    """W' of a DoRA by definition, every seventh row flipped: BA is `strength` of W, m is off by `spread`."""
    generator = torch.Generator().manual_seed(seed + 1)
    B, A = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((len(W), rank), (rank, W.shape[1]))
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
    B, A = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((out, rank), (rank, width)))
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
    """Small errors are just as near the best."""
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


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 8), st.integers(1, 40), st.integers(0, 3), st.booleans())
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
    [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}, {"max_error": -0.1}, {"max_error": float("nan")}],
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
    assert found.error == pytest.approx(error(D, found), abs=1e-6)


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
