"""Write what analyze draws: a table, a picture, a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..settings import require_extra
from .analyze import AnalyzeReport, Point
from .files import check_file, write_file

PICTURES = (".png", ".svg")
PAGES = (".html", ".htm")


def check_files(options: Mapping[str, Any]) -> None:
    """Refuse files that cannot be written, and pictures that cannot be drawn, before the work begins.

    Raises OutputError and UsageError.
    """
    for name, what in (("csv", "the table"), ("plot", "the picture"), ("report", "the report")):
        if options[name] is not None:
            check_file(options[name], what, f"--{name} FILE")
    _refuse_same(options)
    if options["plot"] is None or _ending(options["plot"]) in PAGES:
        return
    if _ending(options["plot"]) not in PICTURES:
        raise UsageError(
            f"--plot {options['plot']}: a picture ends with {' or '.join((*PICTURES, '.html'))}.",
            hint="--plot picture.svg",
        )
    require_extra("plot", "--plot")


def _refuse_same(options: Mapping[str, Any]) -> None:
    """Refuse one path for two files; a page may be named twice.

    Raises UsageError.
    """
    seen: dict[Path, str] = {}
    for name in ("csv", "plot", "report"):
        if options[name] is None:
            continue
        other = seen.setdefault(Path(options[name]).resolve(), name)
        both_pages = {name, other} == {"plot", "report"} and _ending(options["plot"]) in PAGES
        if other != name and not both_pages:
            raise UsageError(f"--{other} and --{name} name the same file, {options[name]}.", hint="name two files")


def _ending(path: Any) -> str:
    return Path(path).suffix.lower()


def write_files(report: AnalyzeReport, options: Mapping[str, Any], command: str = "") -> None:
    """Write the files that the options name; pages show the command."""
    if options["csv"] is not None:
        write_file(options["csv"], table(report).encode(), "the table")
    pages = {options["report"], options["plot"] if _ending(options["plot"] or "") in PAGES else None} - {None}
    if pages:
        from .analyze_page import render_analysis

        page = render_analysis(report, command).encode()
        for path in pages:
            write_file(path, page)
    if options["plot"] is not None and _ending(options["plot"]) in PICTURES:
        from .analyze_picture import draw

        write_file(options["plot"], draw(report, _ending(options["plot"])[1:]), "the picture")


def table(report: AnalyzeReport) -> str:
    """Return the points as CSV, one a line; quantiles have columns of their own."""
    names = [field.name for field in fields(Point) if field.name != "norm_ratio"]
    ratios = ("least", "p5", "median", "p95", "most")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *(f"norm_ratio_{name}" for name in ratios)])
    for point in report.points:
        values = ["" if getattr(point, name) is None else getattr(point, name) for name in names]
        writer.writerow([*values, *((point.norm_ratio or {}).get(name, "") for name in ratios)])
    return text.getvalue()
