"""Print: the answer on stdout, everything else on stderr. Nothing else in the package prints."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import click

from ..errors import DoraConvertError, printable

if TYPE_CHECKING:
    from rich.table import Table
    from tqdm import tqdm

SHOWN = 10
"""Entries of a list that are shown without --verbose."""
UNFOLDED = 1 << 16
"""Columns of a table that is not drawn on a terminal: programs read it line by line."""
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

    def show(self, report: Answer, short: str, parts: Callable[..., Iterable[Table | str]]) -> None:
        """Print the answer: JSON, `short` with --quiet, else the tables and lines of `parts(report, every=…)`."""
        self.close()
        try:
            if self._json:
                click.echo(as_json(report.to_dict(), indent=2))
            elif self._quiet:
                click.echo(short)
            else:
                draw(parts(report, every=self._verbose))
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
        with console.capture() as drawn:
            console.print(Text(printable(part)) if isinstance(part, str) else part)
        click.echo(drawn.get(), nl=False)


def as_json(value: object, indent: int | None = None) -> str:
    """Return a JSON document whose control characters are escaped, those beyond ASCII included."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return re.sub(r"[^\n -~]", lambda match: match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1], text)


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
