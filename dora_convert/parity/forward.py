"""Compute an adapter's own outputs by its forward, without the product of its factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor

from ..plan.item import Edit


class RowPart(Protocol):
    """One edit's part in some rows: V − W, and m/n, which broadcasts."""

    @property
    def delta(self) -> Tensor:
        """V − W."""

    @property
    def f(self) -> Tensor:
        """m/n."""


def forward(
    W: Tensor,
    pairs: Iterable[tuple[Edit, RowPart]],
    factors: Callable[[int], tuple[Tensor, Tensor, float]],
    x: Tensor,
    *,
    by_columns: bool,
) -> Tensor:
    """Return the outputs of some rows W for inputs x: Wx + s·B(Ax), times m/n.

    With `by_columns`, for a weight stored as (in, out), return the addend of these rows to all outputs. Kinds
    without two factors have no shorter way than V itself.
    """
    before = (W.T if by_columns else W) @ x
    y = before.clone()
    for number, (edit, part) in enumerate(pairs):
        if not edit.low or (part.f.dim() and edit.axis != 1 - by_columns):
            changed = (W + part.delta) * part.f - W
            y += edit.weight * ((changed.T if by_columns else changed) @ x)
            continue
        left, right, scale = factors(number)
        change = scale * (right.T @ (left.T @ x) if by_columns else left @ (right @ x))
        f = part.f.view(-1, 1) if part.f.dim() else part.f
        y += edit.weight * ((before + change) * f - before)
    return y
