"""What from-lora, to-lora and extract have in common on the command line: how they run, and how their answer looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..sizes import format_size
from .sink import Sink, fold_name, printable, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..reports.fitting import MadeDryRun, MadeReport


def run_verb(
    verb: Callable[..., MadeReport | MadeDryRun],
    *refs: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **chosen: Any,
) -> None:
    """Run a verb that writes an adapter, and show its report."""
    sink = Sink(as_json=as_json, quiet=quiet, verbose=verbose)
    try:
        report = verb(*refs, on_progress=sink.progress, on_notice=sink.notice, **chosen)
    finally:
        sink.close()
    sink.show(report, report.out, lambda every: parts(report.to_dict(), every=every))


def parts(report: dict[str, Any], *, every: bool) -> Iterator[Table | str]:
    """The report for people."""
    if report.get("dry_run"):
        yield from planned(report)
        return
    yield modules_table(report["modules"], every=every)
    yield from map(printable, summary(report, every=every))


def planned(report: dict[str, Any]) -> Iterator[str]:
    """What would be written."""
    plan = report["plan"]
    yield f"{len(plan['modules'])} modules; nothing was written"
    yield (
        f"would write at most {format_size(plan['bytes_out'])}, holding {format_size(plan['memory'])} in memory "
        f"(at least {format_size(plan['least_memory'])})"
    )
    yield f"out: {report['out']}"


COLUMNS = {"output_error": "output error", "lora_error": "LoRA's error"}
"""Further numbers of a module that are shown where a verb reports them."""


def modules_table(modules: list[dict[str, Any]], *, every: bool) -> Table:
    """Modules by kind, layers counted together: their ranks, and the worst error of each kind; `every` lists each one."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for module in modules:
        name = module["name"].removesuffix(".weight")
        groups.setdefault(name if every else fold_name(name), []).append(module)
    more = [key for key in COLUMNS if any(key in module for module in modules)]
    rows = [
        (name, len(group), ranks(group), *(worst(group, key) for key in ("relative_error", *more)))
        for name, group in groups.items()
    ]
    columns = ("module", ">n", ">rank", ">largest error", *(f">{COLUMNS[key]}" for key in more))
    return table(columns, rows)


def ranks(modules: list[dict[str, Any]]) -> str:
    """One rank, or the least and the largest."""
    found = sorted({module["rank"] for module in modules})
    return str(found[0]) if len(found) == 1 else f"{found[0]} – {found[-1]}"


def worst(modules: list[dict[str, Any]], key: str) -> str:
    """The largest of some numbers."""
    found = [module[key] for module in modules if module.get(key) is not None]
    return f"{max(found):.2g}" if found else ""


def summary(report: dict[str, Any], *, every: bool) -> Iterator[str]:
    """What it comes to, in a few lines."""
    yield f"relative error over all modules: {report['relative_error']:.2g}"
    for key, text in (("left_as_lora", "left as LoRA in OUT/lora"),):
        if names := report.get(key):
            shown = len(names) if every else 10
            yield f"{text}: {', '.join(names[:shown])}{' …' if len(names) > shown else ''}"
    peak = report["peak_memory_bytes"]
    memory = f"peak memory {format_size(peak)}" if peak else "peak memory unknown"
    yield f"{format_size(report['bytes_written'])} in {report['seconds']:.1f} s, {memory}"
    if pushed := report.get("pushed"):
        yield f"pushed: {pushed['url']}"
    yield f"out: {report['out']}"
