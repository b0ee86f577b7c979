"""Print the reports of from-lora, to-lora and extract for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..settings import format_size
from .merge import fold_name, written
from .sink import Sink, printable, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..reports.fitting import MadeDryRun, MadeReport

COLUMNS = {"output_error": "output error", "lora_error": "LoRA's error"}
"""Further numbers of a module, for the verbs that report them."""


def show(sink: Sink, report: MadeReport | MadeDryRun) -> None:
    """Print a report."""
    sink.show(report, report.out, lambda every: parts(report.to_dict(), every=every))


def parts(report: dict[str, Any], *, every: bool) -> Iterator[Table | str]:
    """Yield the report for people: the modules, and a summary."""
    if report.get("dry_run"):
        yield from _planned(report["plan"])
    else:
        yield _modules_table(report["modules"], every=every)
        yield from map(printable, _summary(report, every=every))
    yield printable(f"out: {report['out']}")


def _planned(plan: dict[str, Any]) -> Iterator[str]:
    """Yield the sizes of a plan."""
    yield f"{len(plan['modules'])} modules; nothing was written"
    yield (
        f"would write at most {format_size(plan['bytes_out'])}, holding {format_size(plan['memory'])} "
        f"in memory (at least {format_size(plan['least_memory'])})"
    )


def _modules_table(modules: list[dict[str, Any]], *, every: bool) -> Table:
    """Return the ranks and the largest errors by kind of module; `every` lists each module."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for module in modules:
        name = module["name"].removesuffix(".weight")
        groups.setdefault(name if every else fold_name(name), []).append(module)
    more = [key for key in COLUMNS if any(key in module for module in modules)]
    rows = [
        (name, len(group), _ranks(group), *(_largest(group, key) for key in ("relative_error", *more)))
        for name, group in groups.items()
    ]
    columns = ("module", ">n", ">rank", ">largest error", *(f">{COLUMNS[key]}" for key in more))
    return table(columns, rows)


def _ranks(modules: list[dict[str, Any]]) -> str:
    """Return the rank of some modules, or the least and the largest."""
    ranks = sorted({module["rank"] for module in modules})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} – {ranks[-1]}"


def _largest(modules: list[dict[str, Any]], key: str) -> str:
    """Return the largest of a number that some modules have."""
    values = [module[key] for module in modules if module.get(key) is not None]
    return f"{max(values):.2g}" if values else ""


def _summary(report: dict[str, Any], *, every: bool) -> Iterator[str]:
    """Yield the error over all modules, sizes, and the upload."""
    yield f"relative error over all modules: {report['relative_error']:.2g}"
    if names := report.get("left_as_lora"):
        shown = len(names) if every else 10
        yield f"left as LoRA in OUT/lora: {', '.join(names[:shown])}{' …' if len(names) > shown else ''}"
    yield written(report)
    if pushed := report.get("pushed"):
        yield f"pushed: {pushed['url']}"
