"""Lay out the page of an adapter or a checkpoint: facts, programs and tables, for inspect.html.j2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..settings import format_size
from . import Table, table
from .advice import grouped_commands
from .checkpoint import CheckpointReport, about_checkpoint, about_merge
from .inspect import AdapterReport, about_adapter, modules_table, weights_table
from .merge import ledger_table
from .page import draw_page

APART = (
    "note",
    "unusual",
    "would not be merged",
    "ignored",
    "fits ",
    "does not fit ",
    "hint",
    "warning",
    "made by ",
    " ",
)
"""Beginnings of lines of the report in words that have a place of their own on the page."""


def render_inspection(report: AdapterReport | CheckpointReport, command: str = "") -> str:
    """Return the page of a report."""
    own = _of_checkpoint(report) if isinstance(report, CheckpointReport) else _of_adapter(report)
    commands = list(grouped_commands(report.loaders))
    return draw_page("inspect.html.j2", report, command, commands=commands, **own)


def _facts(lines: Iterable[str], report: AdapterReport | CheckpointReport) -> Iterator[tuple[str, str]]:
    """Yield the facts of a report in words as labels and texts."""
    for line in lines:
        if not line.startswith(APART):
            label, colon, text = line.partition(": ")
            yield (label, text) if colon else ("size", line)
    yield "address", report.ref
    if report.commit:
        yield "commit", report.commit


def _of_checkpoint(report: CheckpointReport) -> dict[str, Any]:
    """Return the variables of a checkpoint's page."""
    shards = [(shard["file"], shard["tensors"], format_size(shard["bytes"])) for shard in report.shards]
    tables = [("Tensors", weights_table(report.weights))]
    tables += [("Shards", table(("file", ">tensors", ">size"), shards))] if len(shards) > 1 else []
    facts = list(_facts(about_checkpoint(report, every=False), report))
    return {"facts": facts, "tables": tables, "merges": list(map(about_merge, report.merges))}


def _of_adapter(report: AdapterReport) -> dict[str, Any]:
    """Return the variables of an adapter's page."""
    landing, refused = report.landing, report.refused
    problems = [f"Would not be merged: {refused['message']}"] if refused else []
    if landing and not landing.fits:
        problems.append(f"Does not fit {landing.base}: {landing.message}")
        problems += [f"Hint: {landing.hint}"] if landing.hint else []
    faults: dict[str, list[str]] = {}
    for fault in (*report.faults, *(refused["faults"] if refused else ()), *(landing.faults if landing else ())):
        names = faults.setdefault(fault["why"], [])
        names += [fault["what"]] if fault["what"] not in names else []
    return {
        "facts": list(_facts(about_adapter(report, every=False), report)),
        "tables": _tables(report),
        "problems": problems,
        "faults": faults,
        "warnings": landing.warnings if landing else (),
        "verdict_word": _verdict(report),
    }


def _tables(report: AdapterReport) -> list[tuple[str, Table]]:
    """Return the tables of an adapter's page with their titles."""
    modules = modules_table(report.modules, every=False) if report.modules else weights_table(report.weights)
    tables = [("Modules", modules)]
    if report.landing and report.landing.ledger:
        tables.append((f"In {report.landing.base}", ledger_table(report.landing.ledger, every=False)))
    if report.ignored:
        tables.append(("Ignored tensors", table(("tensor", "reason"), list(report.ignored.items()))))
    return tables


def _verdict(report: AdapterReport) -> str:
    """Return the words beside the title; "" if there is nothing to judge."""
    if report.landing:
        return "fits" if report.landing.fits else "does not fit"
    return "would not be merged" if report.faults or report.refused else ""
