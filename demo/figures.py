"""Draw three trainings of SmolLM2 side by side, as Figure 2 of the DoRA paper: ΔM over ΔD of the query matrices.

    python figures.py BASE CLOUDS OUT

CLOUDS is what clouds.py leaves; OUT is a folder for clouds.png. The correlations are printed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

import dora_convert

TITLES = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA"}
MARKERS = ("o", "s", "^", "D")
KINDS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def panel(axes: Any, report: Any, title: str, kind: str = "q_proj") -> None:
    """Draw one training: colour is the layer, the marker is the step."""
    points = [point for point in report.points if point.kind == kind]
    layers = Normalize(0, max(point.layer for point in points))
    for step, marker in zip(report.tuned, MARKERS, strict=True):
        mine = [point for point in points if point.step == step.step]
        x, y = [p.delta_direction for p in mine], [p.delta_magnitude for p in mine]
        style = {"marker": marker, "s": 16, "linewidths": 0.3, "edgecolors": "#1c2430"}
        axes.scatter(x, y, c=[p.layer for p in mine], norm=layers, cmap="viridis", label=f"step {step.step}", **style)
    found = report.correlation[kind]
    ends = [choose(point.delta_direction for point in points) for choose in (min, max)]
    axes.plot(ends, [found.intercept + found.slope * x for x in ends], "--", color="#c2410c", linewidth=1)
    correlation = f"{found.r:+.2f}".replace("-", "−")
    axes.set_title(f"{title}: r = {correlation}", fontsize=10, loc="left")
    axes.set_xlabel("ΔD", fontsize=9)
    axes.set_ylabel("ΔM", fontsize=9)
    axes.tick_params(labelsize=7)
    axes.ticklabel_format(scilimits=(0, 0), useMathText=True)
    axes.grid(color="#dde2e9", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main(base: str, clouds: str, out: str) -> None:
    figure = Figure(figsize=(10, 3.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (kind, title) in zip(panels, TITLES.items(), strict=True):
        report = dora_convert.analyze(base, Path(clouds) / kind, include=["*.layers.*"])
        panel(axes, report, title)
        rows = {name: report.correlation[name] for name in KINDS}
        text = "  ".join(f"{name} {each.r:+.2f} ({each.low:+.2f} to {each.high:+.2f})" for name, each in rows.items())
        print(f"{title:17}  {text}")
    shades = Normalize(0, 29)
    bar = figure.colorbar(ScalarMappable(shades, colormaps["viridis"]), ax=panels, fraction=0.02, pad=0.01)
    bar.set_label("layer", fontsize=9)
    bar.ax.tick_params(labelsize=7)
    marks, names = panels[0].get_legend_handles_labels()
    figure.legend(marks[:4], names[:4], loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    Path(out).mkdir(exist_ok=True)
    figure.savefig(Path(out) / "clouds.png", metadata={"Software": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
