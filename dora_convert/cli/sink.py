"""Print: the answer on stdout, everything else on stderr. Nothing else in the package prints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import click

from ..errors import DoraConvertError

if TYPE_CHECKING:
    from rich.table import Table
    from tqdm import tqdm

SHOWN = 10
"""Entries of a list that are shown without --verbose."""
LONGEST_NAME = 40
"""Characters of a name that is not broken into lines."""

Entry = TypeVar("Entry")


class Answer(Protocol):
    """A verb's report."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as `--json` prints it."""


class Sink:
    """One command's output in one of three modes: a table, one JSON document, or the result's path alone."""

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool) -> None:
        self._json, self._quiet, self._verbose = as_json, quiet, verbose
        self._bar: tqdm[Any] | None = None

    def notice(self, text: str) -> None:
        """Print a notice or a warning on stderr."""
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
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def show(self, report: Answer, short: str, parts: Callable[..., Iterable[Table | str]]) -> None:
        """Print the answer: JSON, `short` with --quiet, else the tables and lines of `parts(report, every=…)`."""
        self.close()
        if self._json:
            click.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
        elif self._quiet:
            click.echo(short)
        else:
            self._draw(parts(report, every=self._verbose))

    @staticmethod
    def _draw(parts: Iterable[Table | str]) -> None:
        """Print tables and lines."""
        from rich.console import Console

        console = Console(highlight=False, markup=False)
        for part in parts:
            if isinstance(part, str):
                click.echo(part)
            else:
                console.print(part)


def cut(entries: Sequence[Entry], *, every: bool) -> Sequence[Entry]:
    """Return the entries of a list that are shown; `every` shows all."""
    return entries if every else entries[:SHOWN]


def rest(entries: Sequence[object], what: str, *, every: bool) -> Iterator[str]:
    """Yield a line on the entries that are not shown, if there are any."""
    if len(entries) > SHOWN and not every:
        yield f"… and {len(entries) - SHOWN} {what} more (--verbose)"


def joined(names: Sequence[str], *, every: bool) -> str:
    """Return names in one line."""
    return ", ".join(cut(names, every=every)) + (" …" if len(names) > SHOWN and not every else "")


def printable(text: str) -> str:
    """Return one line for a terminal: unprintable characters, which names may hold, are escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table; the first column holds names, and columns that begin with > hold numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    cells = [[Text(printable(str(cell))) for cell in row] for row in rows]
    whole = max((len(row[0]) for row in cells), default=0) <= LONGEST_NAME
    for number, column in enumerate(columns):
        side: Literal["left", "right"] = "right" if column[0] == ">" else "left"
        table.add_column(column.removeprefix(">"), justify=side, overflow="fold", no_wrap=whole and not number)
    for row in cells:
        table.add_row(*row)
    return table


def show_error(error: DoraConvertError, *, as_json: bool, colour: bool | None, outcome: bool = True) -> None:
    """Print an error on stderr: one JSON document, or text for people."""
    if as_json:
        click.echo(json.dumps(error.to_dict(), ensure_ascii=False), err=True)
        return
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {error.text()}", err=True, color=colour)
    if outcome:
        click.echo(error.outcome, err=True)
    if error.hint:
        click.echo(f"Hint: {error.hint}", err=True)
