"""What `verify` reports, as one HTML file: no scripts, nothing fetched, light or dark as the reader has it."""

from __future__ import annotations

import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from ..errors import OutputError
from .figures import figures
from .verify import CheckedModule, OutputsReport, VerifyReport

WIDTH, HEIGHT, LEFT, BELOW, EDGE = 720, 420, 70, 50, 15
"""Of the chart, in its own units; the last three are its margins."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5b6675; --line: #d5dae1; --paper: #fff; --dot: #2563a8; --wrong: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --dim: #98a3b3; --line: #343c48; --paper: #14181e; --dot: #6aaaf0; --wrong: #ff8a4c; }
}
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 .differ, tr.wrong td, .problems li::marker { color: var(--wrong); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt, figcaption { color: var(--dim); } dd, figure { margin: 0; } dd, li, td { overflow-wrap: anywhere; }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: var(--dim); }
svg line { stroke: var(--line); } svg line.even { stroke: var(--dim); stroke-dasharray: 4 4; } svg circle { fill: var(--dot); fill-opacity: .7; }
svg circle.wrong, .key { fill: var(--wrong); color: var(--wrong); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
"""


def check_page(path: str | os.PathLike[str]) -> None:
    """Refuse a path that no page can be written to, before anything is compared.

    Raises OutputError.
    """
    where = Path(path)
    try:
        folder = where.parent.stat().st_mode
        if not stat.S_ISDIR(folder) or not os.access(where.parent, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write the report {where}: its folder cannot be written to")
        try:
            mode = where.stat().st_mode
        except FileNotFoundError:
            return
    except (OSError, ValueError) as error:
        raise _refused(where, error) from error
    if not stat.S_ISREG(mode):
        what = "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"
        raise OutputError(
            f"cannot write the report {where}: it {what}", hint="name a file: --report FILE.html"
        )


def write_page(report: VerifyReport | OutputsReport, path: str | os.PathLike[str]) -> None:
    """Write the page whole or not at all; a file of that name is replaced.

    Raises OutputError.
    """
    where = Path(path)
    builder = where.parent / f".dora-convert-{secrets.token_hex(8)}.tmp"
    body = "\n".join(lines(report)).encode(errors="backslashreplace")
    try:
        with builder.open("xb") as file:
            file.write(body)
        builder.replace(where)
    except (OSError, ValueError) as error:
        raise _refused(where, error) from error
    finally:
        builder.unlink(missing_ok=True)


def _refused(where: Path, error: OSError | ValueError) -> OutputError:
    why = error.strerror if isinstance(error, OSError) else str(error)
    return OutputError(f"cannot write the report {where}: {why}")


def lines(report: VerifyReport | OutputsReport) -> Iterator[str]:
    """The page, from its title to its table."""
    verdict = _text(report.verdict)
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{verdict}: {_text(report.merged)}</title>\n<style>{STYLE}</style>\n</head>\n<body>"
    yield f'<h1>Verdict: <span class="{verdict}">{verdict}</span></h1>'
    yield from _summary(report)
    if isinstance(report, OutputsReport):
        yield from _figures(report)
    texts = {"Problems": report.problems, "Notes": report.notes, "Warnings": report.warnings}
    for title, found in texts.items():
        if found:
            yield f'<h2>{title}</h2>\n<ul class="{title.lower()}">'
            yield from (f"<li>{_text(text)}</li>" for text in found)
            yield "</ul>"
    if isinstance(report, VerifyReport) and report.modules:
        yield from _chart(report.modules)
        yield from _table(report.modules)
    yield "</body>\n</html>\n"


def _text(text: str) -> str:
    """Text that a page can hold: what cannot be printed is spelt out, and what HTML would read is escaped."""
    return escape("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))


def _summary(report: VerifyReport | OutputsReport) -> Iterator[str]:
    rows = [
        ("base", report.base),
        *(("adapter", adapter) for adapter in report.adapters),
        ("merged", report.merged),
    ]
    rows += _ran(report) if isinstance(report, OutputsReport) else _compared(report)
    yield "<dl>"
    yield from (f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in rows)
    yield "</dl>"


def _compared(report: VerifyReport) -> list[tuple[str, str]]:
    modules, untouched = report.modules, report.untouched
    wrong = sum(module.wrong_elements for module in modules)
    of_them = sum(bool(module.wrong_elements) for module in modules)
    return [
        ("modules", f"{len(modules):,}, {of_them:,} of them wrong"),
        ("elements", f"{sum(module.elements for module in modules):,}, {wrong:,} of them wrong"),
        ("untouched tensors", f"{untouched.tensors:,}, {untouched.identical:,} of them identical"),
    ]


def _ran(report: OutputsReport) -> list[tuple[str, str]]:
    return [
        ("model", f"{report.architecture} on {report.device}"),
        ("prompts", f"{report.prompts:,}, {report.positions:,} positions"),
    ]


def _figures(report: OutputsReport) -> Iterator[str]:
    """What two models said, compared."""
    yield '<h2>Outputs</h2>\n<div class="wide">\n<table>\n<thead><tr>'
    heads = "", "difference", "rounding alone", "passes up to"
    yield "".join(f'<th scope="col">{head}</th>' for head in heads) + "</tr></thead>\n<tbody>"
    for row in figures(report):
        yield "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>"
    yield "</tbody>\n</table>\n</div>"


def _decades(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten around what a log axis can show."""
    logs = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
    low = math.floor(min(logs))
    return low, max(low + 1, math.ceil(max(logs)))


def _along(value: float, decades: tuple[int, int]) -> float:
    """How far along its axis a value is, from 0 to 1; zero and infinity are at the ends."""
    low, high = decades
    log = math.log10(value) if 0 < value < math.inf else math.copysign(math.inf, value - 1)
    return min(1.0, max(0.0, (log - low) / (high - low)))


def _chart(modules: Iterable[CheckedModule]) -> Iterator[str]:
    """Each module's error against what rounding alone leaves, the wrong ones on top."""
    dots = [
        (module, module.output_floor, module.output_error)
        for module in sorted(modules, key=lambda module: bool(module.wrong_elements))
        if module.output_floor is not None and module.output_error is not None
    ]
    dots = [(module, x, y) for module, x, y in dots if not math.isnan(x + y)]
    if not dots:
        return
    across, up = _decades(x for _, x, _ in dots), _decades(y for *_, y in dots)
    yield f'<h2>Outputs</h2>\n<figure>\n<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="output error">'
    yield from _axes(across, up)
    for module, floor, error in dots:
        x, y = _at(_along(floor, across), _along(error, up))
        look = 'r="5" class="wrong"' if module.wrong_elements else 'r="4"'
        label = f"{_text(module.name)}: {error:.1e}, rounding alone {floor:.1e}"
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}><title>{label}</title></circle>'
    yield '</svg>\n<figcaption>One dot a module; <span class="key">wrong ones in this colour</span>. '
    yield "On the dashed line the error is what rounding alone leaves.</figcaption>\n</figure>"


def _at(x: float, y: float) -> tuple[float, float]:
    return LEFT + x * (WIDTH - LEFT - EDGE), EDGE + (1 - y) * (HEIGHT - BELOW - EDGE)


def _axes(across: tuple[int, int], up: tuple[int, int]) -> Iterator[str]:
    for power in range(across[0], across[1] + 1, 1 + (across[1] - across[0]) // 9):
        (x, top), (_, end) = _at(_along(10.0**power, across), 1), _at(0, 0)
        yield f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{end}"/>'
        yield f'<text x="{x:.1f}" y="{end + 16}" text-anchor="middle">1e{power}</text>'
    for power in range(up[0], up[1] + 1, 1 + (up[1] - up[0]) // 9):
        (left, y), (end, _) = _at(0, _along(10.0**power, up)), _at(1, 0)
        yield f'<line x1="{left}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}"/>'
        yield f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>'
    low, high = max(across[0], up[0]), min(across[1], up[1])
    if low < high:
        (x1, y1), (x2, y2) = (_at(_along(10.0**p, across), _along(10.0**p, up)) for p in (low, high))
        yield f'<line class="even" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
    yield f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">error of rounding alone</text>'
    yield f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">output error</text>'


def _table(modules: Iterable[CheckedModule]) -> Iterator[str]:
    """Every module, the worst first."""
    heads = "module", "elements", "wrong", "max ulp", "output error", "rounding alone", "cause"
    yield '<h2>Modules</h2>\n<div class="wide">\n<table>\n<thead><tr>'
    yield "".join(f'<th scope="col">{head}</th>' for head in heads) + "</tr></thead>\n<tbody>"
    for module in sorted(modules, key=lambda m: (m.wrong_elements, m.output_error or 0.0), reverse=True):
        errors = ["–" if x is None else f"{x:.1e}" for x in (module.output_error, module.output_floor)]
        counts = [f"{count:,}" for count in (module.elements, module.wrong_elements, module.max_ulp)]
        cells = "".join(
            f"<td>{_text(cell)}</td>" for cell in (module.name, *counts, *errors, module.cause or "")
        )
        row = '<tr class="wrong">' if module.wrong_elements else "<tr>"
        yield f"{row}{cells}</tr>"
    yield "</tbody>\n</table>\n</div>"
