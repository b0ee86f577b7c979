"""Print: the answer on stdout, everything else on stderr. Nothing else in the package prints."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

import click

from ..errors import MORE_FILES, DoraConvertError, InterruptedRunError, UsageError, printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from tqdm import tqdm

    from ..reports import Report, Table

UNFOLDED = 1 << 16
"""Columns of a table that is not drawn on a terminal: programs read it line by line."""
WARNING = "warning: "
LONGEST_NAME = 40
"""Characters of a name that is not broken into lines."""


class Sink:
    """One command's output in one of three modes: a table, one JSON document, or the result's path alone."""

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool, tsv: bool = False) -> None:
        self._json, self._tsv, self._quiet, self._verbose = as_json, tsv, quiet, verbose
        self._bar: tqdm[Any] | None = None

    @property
    def for_people(self) -> bool:
        """True if no program reads the answer."""
        return not (self._json or self._tsv or self._quiet)

    def notice(self, text: str) -> None:
        """Print a notice or a warning on stderr; a full device is no reason to stop the work.

        With --quiet, warnings are printed, and notices are not.
        """
        if not self._quiet or text.startswith(WARNING):
            with suppress(OSError):
                if self._bar is not None:
                    self._bar.clear()
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
            elif self._tsv:
                click.echo("\n".join(lines_of(report.parts(every=True))))
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


def lines_of(parts: Iterable[Table | str]) -> Iterator[str]:
    """Yield the tables of a report as tab-separated values, with an empty line between two; its sentences are left out.

    Cells hold no tabs: a control character is escaped.
    """
    for number, part in enumerate(part for part in parts if not isinstance(part, str)):
        yield from [""] if number else []
        yield "\t".join(column.removeprefix(">") for column in part.columns)
        yield from map("\t".join, part.rows)


def as_json(value: object, indent: int | None = None) -> str:
    """Return a JSON document whose control characters are escaped, those beyond ASCII included."""
    text = json.dumps(value, ensure_ascii=False)
    if indent is not None:
        import msgspec

        try:  # four times as quick as Python's own indents
            text = msgspec.json.format(text, indent=indent)
        except (msgspec.DecodeError, UnicodeEncodeError):  # NaN, and halves of characters
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


def fail(error: BaseException, *, as_json: bool, reads: bool = False) -> int:
    """Print an error on stderr and return the exit code; `reads` leaves out that nothing was written, or kept."""
    if isinstance(error, click.ClickException) and not as_json:
        text = StringIO()
        error.show(text)
        click.echo("\n".join(map(printable, text.getvalue().splitlines())), err=True)
        return error.exit_code
    known = _translate(error)
    if reads and isinstance(known, InterruptedRunError):
        known.hint = "rerun the same command; it begins again"
    with suppress(OSError):  # the exit code tells what a full device does not
        show_error(known, in_json=as_json, colour=colour(), outcome=not reads)
    return known.exit_code


def _translate(error: BaseException) -> DoraConvertError:
    """Return any error as one of ours."""
    match error:
        case DoraConvertError():
            error.hint = error.hint or (MORE_FILES if _out_of_files(error) else None)
            return error
        case click.ClickException():
            return UsageError(error.format_message())
        case KeyboardInterrupt() | click.Abort():
            return InterruptedRunError(
                "Interrupted.", hint="finished tensors are kept; rerun the same command to resume"
            )
        case _ if _out_of_files(error):
            return DoraConvertError("Too many open files for this process.", hint=MORE_FILES)
        case OSError():
            return DoraConvertError(f"{error.filename or 'the system'}: {error.strerror or error}.")
        case MemoryError():
            return DoraConvertError("This machine has too little memory.", hint="a smaller --max-memory may help")
    return DoraConvertError(
        f"{type(error).__name__}: {error}", hint="this is a bug; DORA_CONVERT_DEBUG=1 shows where, please report it"
    )


def _out_of_files(error: BaseException | None) -> bool:
    """Return True if an error began with too many open files, which importing a module may hide."""
    while error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def colour() -> bool | None:
    """Return the choice of NO_COLOR and FORCE_COLOR, which Click does not read; None for the terminal's."""
    if os.environ.get("NO_COLOR"):
        return False
    return True if os.environ.get("FORCE_COLOR") else None
