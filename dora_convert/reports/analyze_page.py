"""Lay out the page of an analysis: scatter plots, profiles, a heat map and tables, for analyze.html.j2."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .analyze import AnalyzeReport, Point
from .charts import DASHES, LINES, VIRIDIS, LinearAxis, colour, log_share, marker
from .page import draw_page

LEFT, RIGHT, TOP, BOTTOM = 58, 348, 14, 250
"""Edges of a chart's plot area, in the units of its viewBox."""
CELL, LABEL, HEAD = 22, 150, 8
"""The heat map's cells, and the room for names of modules and above the first row."""
LISTED = 200
"""Modules in the page's table."""
PROFILES = (
    ("delta_magnitude", "ΔM"),
    ("delta_direction", "ΔD"),
    ("relative_change", "‖ΔW‖/‖W‖"),
    ("stable_rank", "stable rank of ΔW"),
    ("spread", "‖w′‖/‖w‖, 95 % − 5 %"),
)
"""The figures that are drawn over the layers; a spread is that of |m|/‖W‖ for a DoRA."""


@dataclass(frozen=True)
class PlotPoint:
    """One kind of module in one layer and step; experts of a layer are one point, their mean."""

    kind: str
    layer: int
    step: int
    module: str
    values: Mapping[str, float]

    @property
    def tip(self) -> str:
        """The text that appears beside the pointer."""
        named = (f"{label} {self.values[name]:.3g}" for name, label in PROFILES if name in self.values)
        return f"{self.module}, step {self.step}: " + ", ".join(named)


def gather(points: Sequence[Point]) -> list[PlotPoint]:
    """Return the points with a layer, several modules of one kind, layer and step as one."""
    groups: defaultdict[tuple[str, int, int], list[Point]] = defaultdict(list)
    for point in points:
        if point.layer is not None:
            groups[point.kind, point.layer, point.step].append(point)
    return [PlotPoint(kind, layer, step, _name(same), _means(same)) for (kind, layer, step), same in groups.items()]


def _name(points: Sequence[Point]) -> str:
    return points[0].module if len(points) == 1 else f"{points[0].module} and {len(points) - 1} like it"


def _means(points: Sequence[Point]) -> dict[str, float]:
    columns = {name: [getattr(point, name) for point in points] for name, _ in PROFILES if name != "spread"}
    columns["spread"] = [ratio["p95"] - ratio["p5"] for point in points if (ratio := point.norm_ratio)]
    kept = {name: [value for value in values if value is not None] for name, values in columns.items()}
    return {name: statistics.fmean(values) for name, values in kept.items() if values}


def render_analysis(report: AnalyzeReport, command: str = "") -> str:
    """Return the page of a report."""
    points = gather(report.points)
    kinds = list(dict.fromkeys(point.kind for point in points))
    layers = [point.layer for point in points]
    steps = [step.step for step in report.tuned]
    last = report.tuned[-1].checkpoint if report.tuned else ""
    now = sorted(
        (point for point in report.points if point.checkpoint == last),
        key=lambda point: point.relative_change or 0.0,
        reverse=True,
    )
    return draw_page(
        "analyze.html.j2",
        report,
        command,
        steps=steps,
        markers=[(marker(k), step) for k, step in enumerate(steps)],
        span=(min(layers), max(layers)) if layers else None,
        ramp=VIRIDIS,
        scatters=[each for kind in kinds if (each := _scatter(kind, points, report))],
        profiles=[(step, _profiles(step, kinds, points)) for step in steps],
        lines=[(kind, *_style(k)) for k, kind in enumerate(kinds)],
        heat=_heat(kinds, points, steps),
        modules=now[:LISTED],
        hidden=max(0, len(now) - LISTED),
    )


def _scatter(kind: str, points: Sequence[PlotPoint], report: AnalyzeReport) -> dict[str, Any] | None:
    """Return the panel of one kind of module: ΔM over ΔD; None if nothing moved."""
    moved = [point for point in points if point.kind == kind and point.values.get("relative_change")]
    if not moved:
        return None
    x = LinearAxis.around([point.values["delta_direction"] for point in moved], LEFT, RIGHT)
    y = LinearAxis.around([point.values["delta_magnitude"] for point in moved], BOTTOM, TOP)
    lowest, highest = (choose(point.layer for point in points) for choose in (min, max))
    order = {step.step: k for k, step in enumerate(report.tuned)}
    dots = [
        (
            x.at(point.values["delta_direction"]),
            y.at(point.values["delta_magnitude"]),
            colour((point.layer - lowest) / (highest - lowest or 1)),
            marker(order[point.step]),
            point.tip,
        )
        for point in moved
    ]
    return {"kind": kind, "x": x, "y": y, "dots": dots, "line": _line(kind, x, y, report), **_words(kind, report)}


def _words(kind: str, report: AnalyzeReport) -> dict[str, Any]:
    """Return the correlation beside a panel's title."""
    return {"correlation": report.correlation.get(kind)}


def _line(kind: str, x: LinearAxis, y: LinearAxis, report: AnalyzeReport) -> tuple[float, float, float, float] | None:
    """Return the ends of the regression line inside the plot; None without a line."""
    found = report.correlation.get(kind)
    if found is None or found.slope is None or found.intercept is None:
        return None
    ends = [x.low, x.high]
    if found.slope:
        crossings = sorted((value - found.intercept) / found.slope for value in (y.low, y.high))
        ends = [max(ends[0], crossings[0]), min(ends[1], crossings[1])]
    heights = [found.intercept + found.slope * end for end in ends]
    return x.at(ends[0]), y.at(heights[0]), x.at(ends[1]), y.at(heights[1])


def _style(index: int) -> tuple[str, str]:
    """Return a line's colour and pattern."""
    return LINES[index % len(LINES)], DASHES[index // len(LINES) % len(DASHES)]


def _profiles(step: int, kinds: Sequence[str], points: Sequence[PlotPoint]) -> list[dict[str, Any]]:
    """Return a chart of each figure over the layers, one line a kind of module."""
    charts = []
    for name, label in PROFILES:
        shown = [point for point in points if point.step == step and name in point.values]
        if not shown:
            continue
        every = [point for point in points if name in point.values]
        x = LinearAxis.around([point.layer for point in points], LEFT, RIGHT)
        y = LinearAxis.around([point.values[name] for point in every], BOTTOM, TOP, zero=True)
        lines = []
        for k, kind in enumerate(kinds):
            mine = sorted((point for point in shown if point.kind == kind), key=lambda point: point.layer)
            dots = [(x.at(point.layer), y.at(point.values[name]), point.tip) for point in mine]
            if dots:
                lines.append((kind, *_style(k), dots))
        charts.append({"label": label, "x": x, "y": y, "lines": lines, "layers": _layer_ticks(x, shown)})
    return charts


def _layer_ticks(x: LinearAxis, points: Sequence[PlotPoint]) -> list[tuple[float, int]]:
    """Return positions and numbers of at most eight layers."""
    layers = sorted({point.layer for point in points})
    every = -(-len(layers) // 8)
    return [(x.at(layer), layer) for layer in layers[::every]]


def _heat(kinds: Sequence[str], points: Sequence[PlotPoint], steps: Sequence[int]) -> dict[str, Any] | None:
    """Return the map of relative changes: layers across, kinds of modules down, one map a step."""
    values = [change for point in points if (change := point.values.get("relative_change"))]
    if not values:
        return None
    low, high = min(values), max(values)
    layers = sorted({point.layer for point in points})
    column = {layer: LABEL + CELL * k for k, layer in enumerate(layers)}
    row = {kind: HEAD + CELL * k for k, kind in enumerate(kinds)}
    maps = []
    for step in steps:
        cells = [
            (column[point.layer], row[point.kind], _shade(point, low, high), point.tip)
            for point in points
            if point.step == step
        ]
        maps.append((step, cells))
    every = -(-len(layers) // 40)
    return {
        "width": LABEL + CELL * len(layers) + 12,
        "height": HEAD + CELL * len(kinds) + 40,
        "rows": [(top + CELL / 2 + 4, kind) for kind, top in row.items()],
        "columns": [(left + CELL / 2, layer) for layer, left in list(column.items())[::every]],
        "foot": HEAD + CELL * len(kinds) + 16,
        "maps": maps,
        "low": low,
        "high": high,
        "middle": (low * high) ** 0.5,
    }


def _shade(point: PlotPoint, low: float, high: float) -> str | None:
    """Return a cell's colour; None if the module did not move."""
    change = point.values.get("relative_change")
    return colour(log_share(change, low, high)) if change else None
