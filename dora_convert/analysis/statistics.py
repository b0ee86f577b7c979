"""Compute correlations with their confidence, regression lines and kinds of modules, in plain Python."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from ..reports.analyze import KindCorrelation, Point

FEW = 10
"""Fewer points than these get a sentence: the interval of r is wider than most effects."""
NORMAL_95 = 1.959964
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


def layer_of(module: str) -> int | None:
    """Return the first number in a module's name; None without one."""
    number = _NUMBER.search(module)
    return int(number[0]) if number else None


def name_kinds(modules: Iterable[str]) -> dict[str, str]:
    """Return the kind of each module: the shortest end of its name that names no other kind.

    Modules whose names differ in numbers only are of one kind: q_proj, or attn.c_proj beside mlp.c_proj.
    """
    whole = {module: _NUMBER.sub("*", module) for module in modules}
    kinds: dict[str, str] = {}
    ends: defaultdict[str, set[str]] = defaultdict(set)
    for kind in set(whole.values()):
        parts = kind.split(".")
        for start in range(len(parts)):
            ends[".".join(parts[start:])].add(kind)
    for kind in set(whole.values()):
        parts = kind.split(".")
        names = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        kinds[kind] = next(name for name in names if len(ends[name]) == 1 and name != "*")
    return {module: kinds[kind] for module, kind in whole.items()}


def correlate(points: Collection[Point]) -> dict[str, KindCorrelation]:
    """Return the correlation of each kind of module that has a layer; points that did not move do not count.

    Several modules of one kind, layer and step, such as experts, are one point: their mean.
    """
    groups: defaultdict[str, defaultdict[tuple[str, int], list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        if point.layer is not None and point.relative_change:
            groups[point.kind][point.checkpoint, point.layer].append(point)
    return {kind: _correlation([_mean(same) for same in cells.values()]) for kind, cells in groups.items()}


def _mean(points: Sequence[Point]) -> tuple[float, float]:
    """Return the mean ΔD and ΔM of some points."""
    count = len(points)
    return sum(p.delta_direction for p in points) / count, sum(p.delta_magnitude for p in points) / count


def _correlation(pairs: Sequence[tuple[float, float]]) -> KindCorrelation:
    r, slope, intercept = pearson(pairs)
    low, high = interval(r, len(pairs))
    note = None
    if r is None:
        note = f"{_points(len(pairs))}: too few, or too alike, for a correlation"
    elif low is None or high is None:
        note = f"{_points(len(pairs))}: too few for a confidence interval; r says nothing"
    elif low < 0 < high:
        note = f"{_points(len(pairs))}: even the sign of r is open (95 %: {low:+.2f} to {high:+.2f})"
    elif len(pairs) < FEW:
        note = f"{_points(len(pairs))}: few (95 %: {low:+.2f} to {high:+.2f})"
    return KindCorrelation(r=r, points=len(pairs), low=low, high=high, slope=slope, intercept=intercept, note=note)


def _points(count: int) -> str:
    return "1 point" if count == 1 else f"{count} points"


def pearson(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None, float | None]:
    """Return r of some (x, y), and slope and intercept of the line of least squares; None if they do not exist."""
    if len(pairs) < 3:
        return None, None, None
    mean_x, mean_y = (math.fsum(values) / len(pairs) for values in zip(*pairs, strict=True))
    xx = math.fsum((x - mean_x) ** 2 for x, _ in pairs)
    yy = math.fsum((y - mean_y) ** 2 for _, y in pairs)
    xy = math.fsum((x - mean_x) * (y - mean_y) for x, y in pairs)
    if not (xx and yy and math.isfinite(xx) and math.isfinite(yy)):
        return None, None, None
    slope = xy / xx
    r = max(-1.0, min(1.0, xy / math.sqrt(xx) / math.sqrt(yy)))
    return r, slope, mean_y - slope * mean_x


def interval(r: float | None, count: int) -> tuple[float | None, float | None]:
    """Return the 95 % confidence interval of a correlation, by Fisher's z; None for fewer than four points."""
    if r is None or count < 4:
        return None, None
    if abs(r) == 1:
        return r, r
    z, width = math.atanh(r), NORMAL_95 / math.sqrt(count - 3)
    return math.tanh(z - width), math.tanh(z + width)


def quantiles(values: Sequence[float]) -> Mapping[str, float] | None:
    """Return least, p5, median, p95 and most of finite values; None without any."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if not ordered:
        return None
    shares = {"least": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "most": 1.0}
    return {name: _quantile(ordered, share) for name, share in shares.items()}


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile, interpolated between the two values around it."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
