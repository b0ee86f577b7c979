"""Print: the answer on stdout, everything else on stderr. Nothing else in the package prints."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import click

from ..errors import DoraConvertError, printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from tqdm import tqdm

    from ..reports import Report, Table

UNFOLDED = 1 << 16
"""Columns of a table that is not drawn on a terminal: programs read it line by line."""
LONGEST_NAME = 40
"""Characters of a name that is not broken into lines."""


class Sink:
    """One command's output in one of three modes: a table, one JSON document, or the result's path alone."""

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool) -> None:
        self._json, self._quiet, self._verbose = as_json, quiet, verbose
        self._bar: tqdm[Any] | None = None

    def notice(self, text: str) -> None:
        """Print a notice or a warning on stderr; a full device is no reason to stop the work."""
        if not self._quiet:
            with suppress(OSError):
                click.echo(text, err=True)

    def progress(self, done: int, total: int) -> None:
        """Move the one progress bar; it is silent off a terminal."""
        if self._bar is None:
            from tqdm import tqdm

            off = True if self._quiet or os.environ.get("TQDM_DISABLE") else None
            self._bar = tqdm(total=total, unit="B", unit_scale=True, disable=off)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def show(self, report: Report, short: str) -> None:
        """Print the answer: JSON, `short` with --quiet, else the report's tables and lines."""
        self.close()
        try:
            if self._json:
                click.echo(as_json(report.to_dict(), indent=2))
            elif self._quiet:
                click.echo(short)
            else:
                draw(report.parts(every=self._verbose))
        except BrokenPipeError:  # as in `| head`: the reader has seen enough
            pass
        except OSError as error:
            raise AnswerError(
                f"The answer cannot be written to stdout: {error.strerror or error}.",
                hint=f"the work is done; the answer in short: {short}",
            ) from error


class AnswerError(DoraConvertError, kind="answer"):
    """An answer that cannot be printed; the work is done."""

    outcome = ""


def draw(parts: Iterable[Table | str]) -> None:
    """Print tables and lines: on a terminal wrapped at words, elsewhere one line each."""
    from rich.console import Console
    from rich.text import Text

    width = None if sys.stdout and sys.stdout.isatty() else UNFOLDED
    console = Console(highlight=False, markup=False, width=width)
    for part in parts:
        with console.capture() as captured:
            console.print(Text(printable(part)) if isinstance(part, str) else drawn(part))
        click.echo(captured.get(), nl=False)


def as_json(value: object, indent: int | None = None) -> str:
    """Return a JSON document whose control characters are escaped, those beyond ASCII included."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return re.sub(r"[^\n -~]", lambda match: match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1], text)


def drawn(part: Table) -> RichTable:
    """Return a table as rich draws it."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    whole = max((len(row[0]) for row in part.rows), default=0) <= LONGEST_NAME
    for number, column in enumerate(part.columns):
        side: Literal["left", "right"] = "right" if column[0] == ">" else "left"
        table.add_column(column.removeprefix(">"), justify=side, overflow="fold", no_wrap=whole and not number)
    for row in part.rows:
        table.add_row(*map(Text, row))
    return table


def show_error(error: DoraConvertError, *, in_json: bool, colour: bool | None, outcome: bool = True) -> None:
    """Print an error on stderr: one JSON document, or text for people."""
    if in_json:
        click.echo(as_json(error.to_dict()), err=True)
        return
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {error.text()}", err=True, color=colour)
    if outcome and error.outcome:
        click.echo(error.outcome, err=True)
    if error.hint:
        click.echo(f"Hint: {printable(error.hint)}", err=True)
