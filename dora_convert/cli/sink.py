"""The only place that prints: the answer on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import click

from ..errors import DoraConvertError
from ..sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table
    from tqdm import tqdm

    from ..reports.inspect import Landing
    from ..reports.merge import DryRunReport, MergeReport


LONGEST_NAME = 40
"""Characters of a name that is not broken into lines."""


class Answer(Protocol):
    """What every verb's report can do."""

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""


class Sink:
    """One command's output in one of three modes: a table, one JSON document, or the result's path alone."""

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool) -> None:
        self._json, self._quiet, self._verbose = as_json, quiet, verbose
        self._bar: tqdm[Any] | None = None

    def notice(self, text: str) -> None:
        """A choice or a warning, on stderr."""
        if not self._quiet:
            click.echo(text, err=True)

    def progress(self, done: int, total: int) -> None:
        """Move the one progress bar; it is silent off a terminal."""
        if self._bar is None:
            from tqdm import tqdm

            off = True if self._quiet or os.environ.get("TQDM_DISABLE") else None
            self._bar = tqdm(total=total, unit="B", unit_scale=True, disable=off)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.close()

    def result(self, report: MergeReport | DryRunReport) -> None:
        """The answer."""
        if self._json:
            click.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
        elif self._quiet:
            click.echo(report.out)
        else:
            self._print(report)

    def show(self, report: Answer, short: str, parts: Callable[[bool], Iterable[Table | str]]) -> None:
        """An answer made of tables and lines: `parts` makes them, of every detail or not; --quiet has `short` alone."""
        if self._json:
            click.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
        elif self._quiet:
            click.echo(short)
        else:
            self._draw(parts(self._verbose))

    def _draw(self, parts: Iterable[Table | str]) -> None:
        from rich.console import Console

        console = Console(highlight=False, markup=False)
        for part in parts:
            if isinstance(part, str):
                click.echo(part)
            else:
                console.print(part)

    def _print(self, report: MergeReport | DryRunReport) -> None:
        from rich.console import Console

        console = Console(highlight=False, markup=False)
        console.print(ledger_table(report, every=self._verbose))
        for line in summary(report):
            click.echo(line)


def printable(text: str) -> str:
    """One line for a terminal: names may hold anything, so what cannot be printed is escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table; columns that begin with > hold numbers, the first one names."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    cells = [[Text(printable(str(cell))) for cell in row] for row in rows]
    whole = max((len(row[0]) for row in cells), default=0) <= LONGEST_NAME
    for place, column in enumerate(columns):
        side: Literal["left", "right"] = "right" if column[0] == ">" else "left"
        table.add_column(column.removeprefix(">"), justify=side, overflow="fold", no_wrap=whole and not place)
    for row in cells:
        table.add_row(*row)
    return table


def ledger_table(report: MergeReport | DryRunReport | Landing, *, every: bool) -> Table:
    """The ledger by kind of weight, layers counted together; `every` lists each one."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("module", overflow="fold")
    table.add_column("n", justify="right")
    table.add_column("fate", overflow="fold")
    groups: dict[tuple[str, str], set[str]] = {}
    for entry in report.ledger:
        name = entry["into"][0].removesuffix(".weight") if entry["into"] else entry["tensor"]
        groups.setdefault(
            (name if every else fold_name(name), f"{entry['fate']}: {entry['why']}"), set()
        ).add(name)
    for (kind, fate), names in groups.items():
        table.add_row(printable(kind), str(len(names)), printable(fate))
    return table


def fold_name(name: str) -> str:
    """Return a tensor's name without its layer numbers and its format's prefix."""
    from ..formats.detect import FORMATS

    for known in FORMATS:
        name = name.removeprefix(known.PREFIX)
    return re.sub(r"\.\d+\.", ".*.", name)


def summary(report: MergeReport | DryRunReport) -> list[str]:
    """What happened, or would, in a few lines."""
    counts = report.tensors
    added = f"{counts['added']} added, " if counts["added"] else ""
    tensors = (
        f"{counts['total']} tensors: {counts['merged']} merged, {counts['replaced']} replaced, {added}"
        f"{counts['copied']} copied"
    )
    fates = Counter(entry["fate"] for entry in report.ledger)
    ledger = f"{len(report.ledger)} adapter tensors: " + ", ".join(f"{n} {fate}" for fate, n in fates.items())
    values = report.to_dict()
    if "plan" in values:
        return [ledger, f"{tensors}; nothing was written", _planned(values["plan"]), f"out: {report.out}"]
    lines = [
        ledger,
        f"{tensors}; {format_size(values['bytes_written'])} in {report.seconds:.1f} s, {_memory(values)}",
    ]
    if checked := values["verified"]:
        lines.append(
            f"checked: {checked['wrong_elements']} of {checked['checked']:,} elements wrong, "
            f"at most {checked['max_ulp']} ulp from the exact result{_lost(values['lost'])}"
        )
    if pushed := values["pushed"]:
        lines.append(f"pushed: {pushed['url']}, {format_size(pushed['bytes_uploaded'])}")
    if outputs := values["outputs"]:
        lines.append(
            f"outputs: {outputs['verdict']}, {outputs['max_abs_logit_error']:.2g} apart at most; "
            f"rounding alone leaves {outputs['rounding_floor']:.2g}"
        )
    return [*lines, f"out: {report.out}"]


def _planned(plan: Mapping[str, int]) -> str:
    return (
        f"would write {format_size(plan['bytes_out'])} in {plan['shards']} files and an undo record of at most "
        f"{format_size(plan['undo_bytes'])}, holding {format_size(plan['memory'])} in memory"
    )


def _memory(values: Mapping[str, Any]) -> str:
    peak = values["peak_memory_bytes"]
    return f"peak memory {format_size(peak)}" if peak else "peak memory unknown"


def _lost(share: float | None) -> str:
    return "" if share is None else f"; rounding took {share:.2%} of the change"


def show_error(error: DoraConvertError, *, as_json: bool, colour: bool | None, outcome: bool = True) -> None:
    """An error on stderr: one JSON document, or text for people."""
    if as_json:
        click.echo(json.dumps(error.to_dict(), ensure_ascii=False), err=True)
        return
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {error.text()}", err=True, color=colour)
    if outcome:
        click.echo(error.outcome, err=True)
    if error.hint:
        click.echo(f"Hint: {error.hint}", err=True)
