"""Explain a wrong tensor: try the known mistakes of merges, one after another, on some of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..engine.host_memory import read_rows
from ..engine.precision import nearest
from ..plan.item import Item
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .expected import Expected

CLOSE = 3.0
"""Largest distance from a mistake's result, in rounding errors of this result."""
FACTOR = 0.02
"""Largest relative distance of a fitted factor from a known one."""


Guess = tuple[str, Tensor]
"""A mistake, and some rows as this mistake leaves them."""


def find_cause(item: Item, written: StoredTensor, rows: Sequence[int], reader: Reader) -> str | None:
    """Return the mistake that explains some wrong rows, in words; None if no known mistake does."""
    if len(item.edits) != 1 or not (low := item.edits[0].low) or item.replaced or low.start:
        return None
    expected, written = Expected(item, reader), replace(written, shape=item.source.shape)
    rows = next(expected.chunks(sorted(rows)))
    got = read_rows(reader, written, rows).double()
    guesses = _guesses(expected, rows, got)
    return next((what for what, guess in guesses if _explains(guess, got, item.dtype)), None)


def _explains(guess: Tensor, got: Tensor, dtype: str) -> bool:
    """Return True if some rows are those of a mistake, up to a rounding or two."""
    error = torch.linalg.vector_norm(nearest(guess, dtype) - guess)
    floor = CLOSE * error + 1e-6 * torch.linalg.vector_norm(guess)
    return bool(torch.linalg.vector_norm(got - guess) <= floor)


def _guesses(expected: Expected, rows: Sequence[int], got: Tensor) -> Iterator[Guess]:
    item = expected.item
    edit = item.edits[0]
    W, delta = expected.before(rows), expected.part(0, rows).delta
    yield "not merged: it is the base's", W
    if edit.decomposed:
        yield "the magnitude was dropped: plain LoRA was merged where DoRA was due", W + delta
        if not edit.two_passes:
            yield "merged twice", _normalised(expected.rows(rows)[0] + delta, expected, rows)
            if math.isfinite(k := _direction(got, W, delta)):
                yield _scaling(k, expected), _normalised(W + k * delta, expected, rows)
    elif factor := _fitted(got - W, delta):
        what = "merged twice" if abs(factor - 2) < FACTOR else _scaling(factor, expected)
        yield what, W + factor * delta
    rows_, columns = item.source.matrix
    if rows_ == columns and item.experts == 1 and not (edit.low and edit.low.experts):
        yield from _turned(expected, rows, W)


def _fitted(change: Tensor, delta: Tensor) -> float | None:
    """Return the factor of the adapter's delta that comes closest to a change."""
    size = float(delta.square().sum())
    return float((change * delta).sum()) / size if size else None


def _factors(expected: Expected) -> dict[str, float]:
    """Return scalings that other tools use, relative to the right one."""
    low = expected.item.edits[0].low
    assert low
    r = low.rank
    return {
        "alpha instead of alpha/r": float(r),
        "alpha/√r instead of alpha/r": math.sqrt(r),
        "alpha/r instead of alpha/√r": 1 / math.sqrt(r),
        "divided by r twice": 1 / r,
        "no scaling at all": 1 / low.scale,
        "half of it": 0.5,
        "twice of it": 2.0,
    }


def _scaling(factor: float, expected: Expected) -> str:
    """Describe a wrong factor."""
    known = (name for name, k in _factors(expected).items() if abs(factor / k - 1) < FACTOR)
    name = next(known, None)
    return f"the scaling is off by a factor of {factor:.4g}" + (f": {name}" if name else "")


def _normalised(V: Tensor, expected: Expected, rows: Sequence[int]) -> Tensor:
    """Return some rows of V with the lengths that the merge gives them."""
    m = torch.linalg.vector_norm(expected.rows(rows)[0], dim=1, keepdim=True)
    return torch.div(V * m, torch.linalg.vector_norm(V, dim=1, keepdim=True))


def _direction(got: Tensor, W: Tensor, delta: Tensor) -> float:
    """Return the k for which rows point along W + k·Δ: the median of the rows' least squares."""
    a, b, c = (W * W).sum(1), (W * delta).sum(1), (delta * delta).sum(1)
    p, q = (W * got).sum(1), (delta * got).sum(1)
    return float(((a * q - b * p) / (c * p - b * q)).nanmedian())


def _turned(expected: Expected, rows: Sequence[int], W: Tensor) -> Iterator[Guess]:
    """Guess a transposed delta, or a magnitude on the wrong axis: square weights accept both silently."""
    everything = range(expected.item.source.matrix[0])
    delta = torch.cat([expected.part(0, chunk).delta for chunk in expected.chunks(everything)])
    edit, turned = expected.item.edits[0], delta.T[list(rows)]
    m = expected.m[0]
    if m is None:
        yield "a factor is transposed", W + turned
        return
    V = W + turned
    if not edit.two_passes:
        size = torch.linalg.vector_norm(V, dim=1, keepdim=True)
        yield "a factor is transposed", V * (m[list(rows), None] / size)
    squares, axis = torch.zeros(len(everything), dtype=torch.float64), 1 if edit.two_passes else 0
    for chunk in expected.chunks(everything):
        part = (expected.before(chunk) + delta[list(chunk)]).square()
        if axis == 0:
            squares += part.sum(dim=0)
        else:
            squares[list(chunk)] = part.sum(dim=1)
    f = m / squares.sqrt()
    V = W + delta[list(rows)]
    wrong = V * f if axis == 0 else V * f[list(rows), None]
    yield "the magnitude is on the wrong axis", wrong
