"""Explain a wrong tensor by a known mistake of merges, if the mistake explains all of its rows.

The written tensor must be the mistake's result, up to roundings, in every block of rows. It must also be much
closer to this result than the right result is, and at the start of the line between both, within the standard
error. Some rows are tried first, then the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.precision import nearest, read_rows
from ..plan.item import Edit, Item
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .expected import Expected

CLOSE = 3.0
"""Largest distance from a mistake's result, in rounding errors of this result."""
CLEARER = 3.0
"""Least distance of the right result from a mistake's, in distances from the mistake's result."""
BIAS = 0.002
"""Largest part of the way from a mistake's result to the right one, beside 3 standard errors."""
UNMERGED = "not merged: it is the base's"
SAMPLE_ELEMENTS = 1 << 16
"""Elements of the rows that are tried first."""
BLOCK_ELEMENTS = 1 << 14
STEPS = 4
"""Steps of Newton's method for a factor; plain LoRA is linear, and needs one."""


class WrongRows(NamedTuple):
    """Some rows of a wrong tensor."""

    numbers: Sequence[int]
    got: Tensor
    W: Tensor  # before the merge
    delta: Tensor  # sBA
    x: Tensor  # the right result
    f: Tensor  # m/n; 1 for LoRA
    m: Tensor | None  # magnitudes that scale rows


Mistake = Callable[[WrongRows], Tensor]
"""Returns some rows as a mistake leaves them."""


def find_cause(expected: Expected, written: StoredTensor, reader: Reader, experts: Sequence[int]) -> str | None:
    """Return the mistakes that explain a wrong tensor, in words; None if no known mistake does.

    `experts` are the numbers of the wrong experts; other tensors are one expert.
    """
    item = expected.item
    if len(item.edits) != 1 or item.combination or item.replaced or item.start:
        return None
    plain = _is_plain(item.edits[0])
    height = item.matrix[0] // item.experts
    numbers = [number for expert in experts for number in range(expert * height, (expert + 1) * height)]
    first, last = item.edits[0].own_rows(0, item.matrix[0])
    numbers = numbers[first:last] if item.edits[0].outputs else numbers
    step = max(1, len(numbers) * item.matrix[1] // SAMPLE_ELEMENTS)
    sample = list(_read(expected, written, reader, numbers[::step]))

    def explains(mistake: Mistake) -> bool:
        rest = _read(expected, written, reader, numbers) if step > 1 else ()
        return _explains(mistake, sample, item.dtype) and _explains(mistake, rest, item.dtype)

    mistakes = _mistakes(expected) if plain else [(UNMERGED, _unmerged)]
    causes = [what for what, mistake in mistakes if explains(mistake)]
    if plain and UNMERGED not in causes and not item.edits[0].two_passes:
        factors = {what: factor for what, factor in _factors(item).items() if explains(_scaled(item, factor))}
        factor = next(iter(factors.values())) if factors else _fitted(item, sample)
        if factors or explains(_scaled(item, factor)):
            why = f": {', or '.join(factors)}" if factors else ""
            causes.insert(0, f"the scaling is off by a factor of {factor:.4g}{why}")
    where = f"in {len(experts)} of {item.experts} experts, " if causes and len(experts) < item.experts else ""
    return where + ", or ".join(causes) or None


def _is_plain(edit: Edit) -> bool:
    """Return True for a LoRA, or a DoRA with one norm per output: the known mistakes are theirs."""
    own = edit.magnitudes
    usual = not own or (own.axis == "rows" and not own.normalised and edit.norm_ratio == 1)
    return edit.low is not None and usual


def _unmerged(rows: WrongRows) -> Tensor:
    return rows.W


def _read(expected: Expected, written: StoredTensor, reader: Reader, rows: Sequence[int]) -> Iterator[WrongRows]:
    """Yield rows of a wrong tensor and of everything that it should come from, block by block."""
    by_rows = None if expected.item.edits[0].axis == 0 else expected.m[0]
    for numbers in expected.chunks(rows, BLOCK_ELEMENTS):
        W, (part,), x = expected.block(numbers)
        got = read_rows(reader, written, numbers).to(W.device).double()
        m = None if by_rows is None else by_rows[list(numbers), None]
        yield WrongRows(numbers=numbers, got=got, W=W, delta=part.delta, x=x, f=part.f, m=m)


def _explains(mistake: Mistake, blocks: Iterable[WrongRows], dtype: str) -> bool:
    """Return True if a mistake leaves these rows, and not the right merge or something between the two.

    Both results are rounded as they were when they were written: the rounding of a small change is no noise.
    """
    error = along = apart = 0.0
    elements = 0
    for rows in blocks:
        result = mistake(rows)
        rounded = nearest(result, dtype)
        off, right = rows.got - rounded, nearest(rows.x, dtype) - rounded
        floor = CLOSE * torch.linalg.vector_norm(rounded - result) + 1e-6 * torch.linalg.vector_norm(result)
        if not torch.linalg.vector_norm(off) <= floor:
            return False
        error, along = error + float((off * off).sum()), along + float((off * right).sum())
        apart, elements = apart + float((right * right).sum()), elements + off.numel()
    if not apart:
        return not elements  # the right result is the mistake's
    spread = math.sqrt(error / elements / apart)
    return error * CLEARER**2 <= apart and abs(along / apart) <= 3 * spread + BIAS


def _mistakes(expected: Expected) -> Iterator[tuple[str, Mistake]]:
    """Yield the mistakes that this update allows, except for factors of its scaling."""
    item, edit = expected.item, expected.item.edits[0]
    rows, columns = item.matrix
    yield UNMERGED, _unmerged
    if edit.decomposed:
        lost = "the magnitude was dropped: plain LoRA was merged where DoRA was due"
        yield lost, lambda rows: rows.W + edit.weight * rows.delta
        if edit.weight != 1:
            yield f"merged at weight 1 instead of {edit.weight:g}", lambda rows: (rows.W + rows.delta) * rows.f
    if edit.decomposed and not edit.two_passes:
        yield "merged twice", lambda rows: rows.x + edit.weight * (_grown(rows.x + rows.delta, rows) - rows.x)
    if rows == columns and item.experts == 1 and not edit.outputs:  # square weights accept wrong axes silently
        if not edit.two_passes:
            yield "a factor is transposed", _transposed(expected)
        if edit.decomposed:
            yield "the magnitude is on the wrong axis", _wrong_axis(expected)


def _grown(V: Tensor, rows: WrongRows) -> Tensor:
    """Return V with rows as long as their magnitudes; V itself for LoRA."""
    return V if rows.m is None else V.mul(rows.m / torch.linalg.vector_norm(V, dim=1, keepdim=True))


def _scaled(item: Item, factor: float) -> Mistake:
    """Return the mistake of a scaling that is off by a factor."""
    weight = item.edits[0].weight
    return lambda rows: rows.W + weight * (_grown(rows.W + factor * rows.delta, rows) - rows.W)


def _transposed(expected: Expected) -> Mistake:
    """Return the mistake of a transposed delta."""
    edit = expected.item.edits[0]

    @cache
    def factors() -> tuple[Tensor, Tensor, float]:
        return expected.factors(0, range(expected.item.matrix[0]))

    def mistake(rows: WrongRows) -> Tensor:
        left, right, scale = factors()
        delta = scale * (right.T[list(rows.numbers)] @ left.T)
        return rows.W + edit.weight * (_grown(rows.W + delta, rows) - rows.W)

    return mistake


def _wrong_axis(expected: Expected) -> Mistake:
    """Return the mistake of magnitudes that scale columns where rows were due, or the other way round."""
    edit, m = expected.item.edits[0], expected.m[0]
    assert m is not None

    @cache
    def norms() -> Tensor:
        squares = torch.zeros_like(m)
        for numbers in expected.chunks(range(len(m))):
            W, (part,), _ = expected.block(numbers)
            squares += (W + part.delta).square().sum(dim=0)
        return squares.sqrt()

    def mistake(rows: WrongRows) -> Tensor:
        V = rows.W + rows.delta
        if edit.two_passes:
            rows = rows._replace(m=m[list(rows.numbers), None])
        scaled = _grown(V, rows) if edit.two_passes else V * (m / norms())
        return rows.W + edit.weight * (scaled - rows.W)

    return mistake


def _factors(item: Item) -> dict[str, float]:
    """Return scalings that other tools use, relative to the right one."""
    edit = item.edits[0]
    assert edit.low
    r, rslora = edit.low.rank, edit.low.rslora
    right = "alpha/√r" if rslora else "alpha/r"
    factors = {
        f"merged at weight 1 instead of {edit.weight:g}": 1.0
        if edit.decomposed or not edit.weight
        else 1 / edit.weight,
        "merged twice": 1.0 if edit.decomposed else 2.0,
        f"alpha instead of {right}": math.sqrt(r) if rslora else r,
        f"{'alpha/r' if rslora else 'alpha/√r'} instead of {right}": math.sqrt(r) ** (-1 if rslora else 1),
        "divided by r twice": 1.0 if rslora else 1 / r,
        "no scaling at all": 1 / edit.low.scale if edit.low.scale else 1.0,
    }
    return {what: factor for what, factor in factors.items() if factor != 1}


def _fitted(item: Item, sample: Sequence[WrongRows]) -> float:
    """Return the factor of the scaling that comes closest to some rows, by Newton's method."""
    factor = 1.0 if sample[0].m is None else _direction(sample)
    for _ in range(STEPS):
        error = size = 0.0
        for rows in sample:
            V = rows.W + factor * rows.delta
            slope = rows.delta
            if rows.m is not None:
                squares = V.square().sum(dim=1, keepdim=True)
                slope = (slope - V * ((V * slope).sum(dim=1, keepdim=True) / squares)) * rows.m / squares.sqrt()
            slope = item.edits[0].weight * slope
            error += float(((rows.got - nearest(_scaled(item, factor)(rows), item.dtype)) * slope).sum())
            size += float(slope.square().sum())
        factor += error / size if size else 0.0
    return factor


def _direction(sample: Sequence[WrongRows]) -> float:
    """Return the k for which rows point along W + k·Δ: the median of the rows' least squares."""
    W, delta, got = (torch.cat(parts) for parts in zip(*((r.W, r.delta, r.got) for r in sample), strict=True))
    a, b, c = (W * W).sum(1), (W * delta).sum(1), (delta * delta).sum(1)
    p, q = (W * got).sum(1), (delta * got).sum(1)
    return float(((a * q - b * p) / (c * p - b * q)).nanmedian())
