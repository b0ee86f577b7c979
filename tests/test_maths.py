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


FLOATS8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def every_value(dtype: torch.dtype) -> np.ndarray:
    """All finite values of a dtype from the largest negative one up, each once, as float64."""
    size = dtype.itemsize
    codes = torch.arange(1 << 8 * size, dtype=torch.int64).to(torch.uint8 if size == 1 else torch.int16)
    values = codes.view(dtype).double()
    return np.unique(values[values.isfinite()].numpy())


def nearest_of(values: np.ndarray, x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the value nearest to each x by comparing distances, which are exact here; ties go to the even code."""
    above = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    low, high = values[above - 1], values[above]
    odd = torch.from_numpy(low).to(dtype).view(torch.uint8 if dtype.itemsize == 1 else torch.int16).numpy() & 1
    tie = (low + high) / 2  # one bit more than the dtype has
    return np.where((x < tie) | ((x == tie) & (odd == 0)), low, high)


def round_without_branches(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round as a device does."""
    return torch.empty_like(x, dtype=dtype).copy_(maths.to_odd_(x, torch.empty_like(x, dtype=torch.float32)))


@pytest.mark.parametrize("dtype", [*HALVES, *FLOATS8], ids=str)
def test_both_roundings_at_every_tie(dtype):
    """All values, all ties, and both neighbours of each in float64, by either way: the nearest by exact distances."""
    values = every_value(dtype)
    ties = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    want = nearest_of(values, x, dtype)
    for way in (round_to, round_without_branches):
        got = way(torch.from_numpy(x)[None], dtype).double()[0].numpy()
        assert np.array_equal(got, want), way


@pytest.mark.parametrize("dtype", [*HALVES, *FLOATS8], ids=str)
@given(st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_both_roundings_of_any_number(dtype, values):
    """The same bits by either way, zeros of both signs and infinities too."""
    x = torch.tensor([values], dtype=torch.float64)
    integers = torch.uint8 if dtype.itemsize == 1 else torch.int16
    got = round_without_branches(x, dtype)
    assert torch.equal(got.view(integers), round_to(x, dtype).view(integers))
    limits = every_value(dtype)[[0, -1]]
    inside = (x[0] >= limits[0]) & (x[0] <= limits[1])
    want = nearest_of(every_value(dtype), x[0][inside].numpy(), dtype)
    assert np.array_equal(got[0][inside].double().numpy(), want)


@given(st.lists(st.floats(width=64), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_rounding_to_float32_agrees_with_numpy(values):
    """One conversion rounds once."""
    x = torch.tensor([values], dtype=torch.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.numpy().astype(np.float32)
    assert np.array_equal(round_to(x, torch.float32).numpy(), want, equal_nan=True)


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
