"""Hold what the verbs return, as plain data that `--json` prints, and each report in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, fields, is_dataclass
from html import escape
from typing import Any, NamedTuple, TypeVar

from ..errors import printable
from ..settings import __version__

SCHEMA = 1
"""Version of the JSON fields."""
SHOWN = 10
"""Entries of a list that are shown if not all are asked for."""
LONGEST_VALUE = 60
"""Characters of a value in a report's repr."""

Entry = TypeVar("Entry")


class Table(NamedTuple):
    """A table for people: the first column holds names, and columns that begin with > hold numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Return the table as lines of text."""
        lines = [[column.removeprefix(">") for column in self.columns], *self.rows]
        widths = [max(len(line[number]) for line in lines) for number in range(len(self.columns))]
        sides = [">" if column[0] == ">" else "<" for column in self.columns]
        drawn = [
            "   ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([drawn[0], "─" * (sum(widths) + 3 * len(widths) - 3), *drawn[1:]])

    def html(self) -> str:
        """Return the table as HTML."""
        sides = ["right" if column[0] == ">" else "left" for column in self.columns]
        head = _row("th", [column.removeprefix(">") for column in self.columns], sides)
        return f"<table>{head}{''.join(_row('td', row, sides) for row in self.rows)}</table>"


def _row(tag: str, cells: Sequence[str], sides: Sequence[str]) -> str:
    drawn = (
        f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for cell, side in zip(cells, sides, strict=True)
    )
    return f"<tr>{''.join(drawn)}</tr>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table of any values; control characters are escaped."""
    return Table(columns, [[printable(str(cell)) for cell in row] for row in rows])


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


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report of one verb; each verb adds its fields. `print` shows tables, a notebook shows HTML."""

    command: str
    seconds: float

    def __init_subclass__(cls) -> None:
        cls.__repr__ = Report.__repr__  # type: ignore[method-assign] # dataclasses give each class a long one

    def to_dict(self) -> dict[str, Any]:
        """Return the report as `--json` prints it."""
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"schema": SCHEMA, "version": __version__, **values}

    def parts(self, *, every: bool) -> Iterator[Table | str]:
        """Yield the report for people, as tables and lines; `every` lists each entry."""
        del every
        yield from (f"{name}: {_short(value)}" for name, value in vars(self).items())

    def __repr__(self) -> str:
        fields = (f"{name}={_short(value)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(fields)})"

    def __str__(self) -> str:
        drawn = (part if isinstance(part, str) else f"{part.text()}\n" for part in self.parts(every=False))
        return "\n".join(drawn).replace(" (--verbose)", "")

    def _repr_html_(self) -> str:
        """Return the report for a notebook."""
        drawn = (
            f"<div>{escape(part)}</div>" if isinstance(part, str) else part.html() for part in self.parts(every=False)
        )
        return "\n".join(drawn).replace(" (--verbose)", "")


def _plain(value: Any) -> Any:
    """Return a value of a report as plain data; a ledger has many texts, which are taken as they are."""
    if isinstance(value, dict):
        return {key: each if isinstance(each, str) else _plain(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)([each if isinstance(each, str) else _plain(each) for each in value])
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _short(value: object) -> str:
    """Return a value as a repr shows it: lists and tables as their lengths."""
    if not isinstance(value, Sized) or isinstance(value, str):
        text = repr(value)
        return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
    return text if len(value) <= SHOWN and len(text := repr(value)) <= LONGEST_VALUE else f"<{len(value)}>"
