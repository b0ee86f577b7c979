"""Draw an analysis with matplotlib: ΔM over ΔD, one panel a kind of module, as Figure 2 of the DoRA paper."""

from __future__ import annotations

import io
from typing import Any

from .analyze import AnalyzeReport
from .analyze_page import PlotPoint, gather
from .charts import VIRIDIS

ACROSS = 4
"""Panels in a row, at most."""
SHAPES = ("o", "s", "^", "D", "v", "P")
"""Markers of steps, as on the page."""
FIT = "#c2410c"


def draw(report: AnalyzeReport, form: str) -> bytes:
    """Return the picture as png or svg; the same report gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    points = [point for point in gather(report.points) if point.values.get("relative_change")]
    kinds = list(dict.fromkeys(point.kind for point in points))
    across = min(ACROSS, max(1, len(kinds)))
    down = -(-len(kinds) // across) or 1
    layers = [point.layer for point in points] or [0]
    shades = Normalize(min(layers), max(layers) or 1), LinearSegmentedColormap.from_list("layers", VIRIDIS)
    with mpl.rc_context({"svg.hashsalt": "dora-convert", "axes.formatter.use_mathtext": True}):
        figure = Figure(figsize=(1.2 + 2.9 * across, 0.9 + 2.7 * down), dpi=150, layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).flatten()
        for panel, kind in zip(panels, kinds, strict=False):
            _panel(panel, kind, [point for point in points if point.kind == kind], report, shades)
        for panel in panels[len(kinds) :]:
            panel.set_axis_off()
        if points:
            scale = mpl.cm.ScalarMappable(*shades)
            figure.colorbar(scale, ax=list(panels), label="layer", fraction=0.03, pad=0.02)
            _legend(figure, report)
        image = io.BytesIO()
        figure.savefig(image, format=form, metadata={"Date": None} if form == "svg" else {"Software": None})
    return image.getvalue()


def _panel(panel: Any, kind: str, points: list[PlotPoint], report: AnalyzeReport, shades: tuple[Any, Any]) -> None:
    """Draw the points of one kind of module, and their regression line."""
    for number, step in enumerate(report.tuned):
        mine = [point for point in points if point.step == step.step]
        panel.scatter(
            [point.values["delta_direction"] for point in mine],
            [point.values["delta_magnitude"] for point in mine],
            c=[point.layer for point in mine],
            norm=shades[0],
            cmap=shades[1],
            marker=SHAPES[number % len(SHAPES)],
            s=20,
            linewidths=0.4,
            edgecolors="#1c2430",
        )
    found = report.correlation.get(kind)
    title = kind
    if found and found.r is not None:
        title = f"{kind}   r = {found.r:+.2f}"
        if found.slope is not None and found.intercept is not None:
            across = [choose(point.values["delta_direction"] for point in points) for choose in (min, max)]
            panel.plot(across, [found.intercept + found.slope * x for x in across], "--", color=FIT, linewidth=1.2)
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel("ΔD", fontsize=9)
    panel.set_ylabel("ΔM", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.ticklabel_format(scilimits=(-2, 3))
    panel.locator_params(nbins=5)
    panel.grid(color="#dde2e9", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, report: AnalyzeReport) -> None:
    """Name the markers of several steps."""
    from matplotlib.lines import Line2D

    if len(report.tuned) < 2:
        return
    marks = [
        Line2D([], [], marker=SHAPES[k % len(SHAPES)], color="#566070", linestyle="", markersize=5)
        for k in range(len(report.tuned))
    ]
    names = [f"step {step.step}" for step in report.tuned]
    figure.legend(marks, names, loc="outside lower center", ncols=min(6, len(names)), fontsize=8, frameon=False)
