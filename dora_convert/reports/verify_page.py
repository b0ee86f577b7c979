"""Lay out the page of a comparison: the chart and both models' continuations, for verify.html.j2."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from .page import draw_page
from .verify import CheckedModule, Continuation, OutputsReport, VerifyReport, figures

LEFT, RIGHT, TOP, BOTTOM = 62, 456, 12, 285
"""Edges of the chart's plot area, in the units of the template's viewBox."""


def render_comparison(report: VerifyReport | OutputsReport, command: str = "") -> str:
    """Return the page of a report."""
    facts: dict[str, Any]
    if isinstance(report, OutputsReport):
        facts = {"figures": list(figures(report)), "pairs": [_pair(each) for each in report.continuations]}
    else:
        modules = sorted(report.modules, key=lambda m: (m.wrong_elements, m.output_error or 0.0), reverse=True)
        causes = any(module.cause for module in modules)
        facts = {"modules": modules, "causes": causes, "chart": _chart(modules)}
    return draw_page("verify.html.j2", report, command, **facts)


def _pair(each: Continuation) -> dict[str, Any]:
    """Return a prompt's two continuations: the part that they share, and the rest of each."""
    same = (a == b for a, b in zip(each.reference, each.merged, strict=False))
    shared = each.reference[: sum(takewhile(bool, same))]
    return {
        "prompt": each.prompt,
        "same": each.reference == each.merged,
        "shared": shared,
        "reference": each.reference.removeprefix(shared),
        "merged": each.merged.removeprefix(shared),
    }


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis from 10**low to 10**high, drawn from `start` to `end`."""

    low: int
    high: int
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float) -> _Axis:
        """Return the axis whose powers of ten enclose all positive finite values."""
        logs = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
        low = math.floor(min(logs))
        return cls(low, max(low + 1, math.ceil(max(logs))), start, end)

    def at(self, value: float) -> float:
        """Return the position of a value; zero and infinity lie at the ends."""
        log = math.log10(value) if 0 < value < math.inf else math.copysign(math.inf, value - 1)
        share = min(1.0, max(0.0, (log - self.low) / (self.high - self.low)))
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, int]]:
        """Positions and powers of at most ten grid lines."""
        powers = range(self.low, self.high + 1, 1 + (self.high - self.low) // 9)
        return [(self.at(10.0**power), power) for power in powers]


def _chart(modules: Sequence[CheckedModule]) -> dict[str, Any] | None:
    """Return the chart of each module's error against the error of rounding alone; None without errors."""
    points = [
        (module, floor, error)
        for module in reversed(modules)  # the wrong ones are drawn last, on top
        if (floor := module.output_floor) is not None
        and (error := module.output_error) is not None
        and not math.isnan(floor + error)
    ]
    if not points:
        return None
    across = _Axis.around((floor for _, floor, _ in points), LEFT, RIGHT)
    up = _Axis.around((error for *_, error in points), BOTTOM, TOP)
    low, high = 10.0 ** max(across.low, up.low), 10.0 ** min(across.high, up.high)
    return {
        "dots": [(module, across.at(floor), up.at(error)) for module, floor, error in points],
        "wrong": any(module.wrong_elements for module, *_ in points),
        "across": across,
        "up": up,
        "even": [(across.at(value), up.at(value)) for value in (low, high)] if low < high else None,
    }
