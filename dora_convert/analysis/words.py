"""Say in sentences what the figures mean: training that hardly moved, exploded, or that rounding loses."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from ..reports.analyze import Collision, Point, TunedStep

HARDLY, LARGE = 1e-4, 0.5
"""Relative changes of a whole model below and above which training is doubtful."""
LOSSY = 0.2
"""The share of ΔW that rounding may lose without a sentence."""
FAR = 10.0
"""A module that moves so many times as far as the median of its kind is named."""
CLOSE = 0.2
"""The cosine from which two changes are called related; random changes of large matrices have none."""


def notes_of(tuned: Sequence[TunedStep], points: Sequence[Point], collision: Sequence[Collision]) -> Iterator[str]:
    """Yield sentences on the last step, and on two adapters."""
    if not tuned:
        return
    last = tuned[-1]
    now = [point for point in points if point.checkpoint == last.checkpoint]
    yield from _of_size(last, now)
    yield from _of_rounding(last)
    yield from _of_outliers(now)
    yield from _of_collision(collision)


def _of_size(last: TunedStep, points: Sequence[Point]) -> Iterator[str]:
    """Yield a sentence if training hardly moved, or exploded."""
    still = [point.module for point in points if not point.relative_change]
    if points and len(still) == len(points):
        yield f"{last.title} changes nothing: all {len(points)} matrices are the base's"
        return
    if still:
        yield f"{len(still)} of {len(points)} matrices did not move at all, such as {still[0]}"
    change = last.relative_change or 0.0
    if change < HARDLY:
        yield f"{last.title} hardly moved: ‖ΔW‖/‖W‖ is {change:.1e} over all matrices; is it undertrained?"
    if change > LARGE:
        yield f"{last.title} moved very far: ‖ΔW‖/‖W‖ is {change:.2g} over all matrices; did training explode?"


def _of_rounding(last: TunedStep) -> Iterator[str]:
    """Yield a sentence on what the base's dtype loses."""
    if last.lost is not None and last.lost > LOSSY:
        yield (
            f"rounding {last.title} into the base's dtype loses {last.lost:.0%} of ΔW's norm: "
            "the weights move by less than their last place; --dtype float32 keeps it"
        )


def _of_outliers(points: Sequence[Point]) -> Iterator[str]:
    """Yield a sentence on each module that moved much farther than others of its kind."""
    kinds: dict[str, list[Point]] = {}
    for point in points:
        if point.relative_change:
            kinds.setdefault(point.kind, []).append(point)
    for kind, same in kinds.items():
        median = statistics.median(point.relative_change or 0.0 for point in same)
        far = max(same, key=lambda point: point.relative_change or 0.0)
        if len(same) > 2 and (far.relative_change or 0.0) > FAR * median:
            times = (far.relative_change or 0.0) / median
            yield f"{far.module} moved {times:.0f} times as far as the median of {kind}"


def _of_collision(collision: Sequence[Collision]) -> Iterator[str]:
    """Yield a sentence on two adapters."""
    cosines = [each.cosine for each in collision if each.cosine is not None]
    conflicts = [each.sign_conflicts for each in collision if each.sign_conflicts is not None]
    if not cosines:
        return
    cosine, conflict = statistics.mean(cosines), statistics.mean(conflicts) if conflicts else 0.0
    word = "agree" if cosine > CLOSE else "work against each other" if cosine < -CLOSE else "are nearly unrelated"
    yield (
        f"the two adapters {word}: the mean cosine of their changes is {cosine:+.2f} over {len(cosines)} modules, "
        f"and {conflict:.0%} of the elements that both change have opposite signs (unrelated ones: 50 %)"
    )
