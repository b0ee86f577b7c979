"""Write the report of verify as one self-contained HTML page from the template page.html.j2."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import printable
from .files import Target, check_file, write_file
from .verify import CheckedModule, OutputsReport, VerifyReport, figures

if TYPE_CHECKING:
    from jinja2 import Environment

LEFT, RIGHT, TOP, BOTTOM = 70, 705, 15, 370
"""Edges of the chart's plot area, in the units of the template's viewBox."""


def check_page(path: Target) -> None:
    """Refuse a path that cannot be written to, before anything is compared.

    Raises OutputError.
    """
    check_file(path)


def write_page(report: VerifyReport | OutputsReport, path: Target) -> None:
    """Write the page completely or not at all, and replace a file of the same name.

    Raises OutputError.
    """
    write_file(path, render(report).encode())


def environment() -> Environment:
    """Return the templates of this folder, which escape everything that could be markup or control a terminal."""
    from jinja2 import Environment, PackageLoader

    templates = Environment(
        loader=PackageLoader("dora_convert", "reports"),
        autoescape=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["count"] = "{:,}".format
    return templates


def render(report: VerifyReport | OutputsReport) -> str:
    """Return the page of a report."""
    templates = environment()
    templates.filters["error"] = lambda value: "–" if value is None else f"{value:.1e}"
    facts: dict[str, Any]
    if isinstance(report, OutputsReport):
        facts = {"figures": list(figures(report)), "modules": (), "chart": None}
    else:
        modules = sorted(report.modules, key=lambda m: (m.wrong_elements, m.output_error or 0.0), reverse=True)
        facts = {"figures": (), "modules": modules, "chart": _chart(modules)}
    return templates.get_template("page.html.j2").render(report=report, **facts)


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
        "across": across,
        "up": up,
        "even": [(across.at(value), up.at(value)) for value in (low, high)] if low < high else None,
    }
