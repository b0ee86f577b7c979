"""Hold what inspect advises: which programs load an adapter or a checkpoint as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import Table, table


@dataclass(frozen=True, kw_only=True)
class LoaderAdvice:
    """One program's verdict."""

    loader: str
    verdict: str  # yes | no | wrong: it loads other weights than were trained | unknown
    why: str
    """The reason, or a condition; "" if the program takes the files as they are."""
    source: str
    """The file or the issue of the program that the verdict rests on."""
    command: str | None
    """The command that makes something the program takes."""
    lossy: bool = False
    """True if the command approximates the adapter; a merge is exact."""


def loaders_table(loaders: Sequence[LoaderAdvice]) -> Table:
    """Return the verdicts."""
    words = {"wrong": "loads other weights"}
    return table(("loader", "takes it", "why"), [(e.loader, words.get(e.verdict, e.verdict), e.why) for e in loaders])


def grouped_commands(loaders: Sequence[LoaderAdvice]) -> Iterator[tuple[str, str, str]]:
    """Yield each command once: the programs that it is for, the command, and a remark if it approximates."""
    names: dict[tuple[str, bool], list[str]] = {}
    for each in loaders:
        if each.command:
            names.setdefault((each.command, each.lossy), []).append(each.loader)
    for (command, lossy), loaders_of in names.items():
        yield ", ".join(loaders_of), command, " (an approximation; merge is exact)" if lossy else ""


def commands_of(loaders: Sequence[LoaderAdvice]) -> Iterator[str]:
    """Yield the commands, each once, after the programs that each is for."""
    yield from (f"for {names}: {command}{remark}" for names, command, remark in grouped_commands(loaders))
