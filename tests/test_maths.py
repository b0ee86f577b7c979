"""The laws of the equations, and rounding against bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_convert.maths import lora as maths

from .toy import rounded

HALVES = [torch.bfloat16, torch.float16]


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return maths.round_to(x, torch.empty_like(x, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5, 1e-7, 2.0**-127, 2.0**-132, 1e3])
def test_rounding_is_to_nearest_even(dtype, scale):
    """Random values at every scale, subnormal ones too, and at both sides of every tie."""
    torch.manual_seed(0)
    x = torch.randn(64, 512, dtype=torch.float64) * scale
    near = x.to(dtype).double()
    above = (x.to(dtype).view(torch.int16) + 1).view(dtype).double()
    ties = (near + above) / 2
    for values in (x, ties, ties * (1 + 1e-13), ties * (1 - 1e-13)):
        finite = values[values.isfinite().all(dim=1)]
        assert torch.equal(round_to(finite, dtype), rounded(finite, dtype))


def test_float16_rounding_agrees_with_numpy():
    """numpy rounds float64 to half directly."""
    x = torch.randn(100, 333, dtype=torch.float64) * torch.logspace(-9, 5, 333, dtype=torch.float64)
    with np.errstate(over="ignore"):
        want = x.numpy().astype(np.float16)
    assert np.array_equal(round_to(x, torch.float16).numpy(), want)


@given(st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=40), st.sampled_from(HALVES))
@settings(max_examples=300, deadline=None)
def test_rounding_any_number(values, dtype):
    """Any float64, zeros of both signs and infinities too; whatever lies beyond the dtype becomes infinite."""
    x = torch.tensor([values], dtype=torch.float64)
    got = round_to(x, dtype)
    finite = got.isfinite() & x.isfinite()
    assert torch.equal(got[finite], rounded(x[finite], dtype))
    limit = torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 4)
    assert (x[~got.isfinite()].abs() >= limit).all()
    assert torch.equal(torch.signbit(got), torch.signbit(x))


def test_rounding_of_nothing():
    """Tensors without elements."""
    assert round_to(torch.empty(0, 5, dtype=torch.float64), torch.bfloat16).shape == (0, 5)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_gives_the_magnitude_as_norm(axis):
    """‖W'‖ = |m| along the axis, and the direction is V's."""
    V = torch.randn(24, 40, dtype=torch.float64)
    m = torch.randn(V.shape[1 - axis], dtype=torch.float64)
    merged = maths.rescale_(V.clone(), m, maths.norms(V, axis), axis)
    torch.testing.assert_close(merged.norm(dim=axis), m.abs())
    cosine = (merged * V).sum(axis) / (merged.norm(dim=axis) * V.norm(dim=axis))
    torch.testing.assert_close(cosine, m.sign())


def test_dora_is_undone_by_its_norms():
    """W = V·n/m … − sBA: what the undo record is kept for."""
    W, A, B = (torch.randn(shape, dtype=torch.float64) for shape in ((24, 40), (4, 40), (24, 4)))
    m = W.norm(dim=1) * 1.3
    V = maths.add_low_rank_(W.clone(), B, A, 0.7)
    n = maths.norms(V, 1)
    merged = maths.rescale_(V, m, n, 1)
    torch.testing.assert_close(merged * (n / m)[:, None] - 0.7 * B @ A, W)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_all_finite(dtype, value):
    """One bad element among many is seen; huge sums are not taken for it."""
    x = torch.full((30, 50), torch.finfo(dtype).max, dtype=dtype)
    assert maths.all_finite(x)
    x[17, 33] = value
    assert not maths.all_finite(x)
