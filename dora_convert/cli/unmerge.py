"""dora-convert unmerge: the command, and its report for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
from typing_extensions import Unpack

from ..options import UnmergeOptions
from . import takes
from .merge import ledger_table, summary
from .sink import Sink, cut, rest, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..reports.merge import DryRunReport, Recovered, UnmergeReport


@click.command("unmerge")
@click.argument("refs", nargs=-1, metavar="MERGED ADAPTER... OUT", required=True)
@takes(UnmergeOptions)
def unmerge(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[UnmergeOptions]) -> None:
    """Take adapters out of a merged checkpoint again.

    MERGED is an output of merge, with its record in MERGED/dora_convert; every ADAPTER is one that was
    merged. OUT is a new folder with the base: bit for bit after merge --undo exact, up to rounding otherwise.
    The report says how many tensors are proven to be the base's by their hashes.

    \b
    Examples:
      dora-convert merge ./base ./adapter ./merged --undo exact
      dora-convert unmerge ./merged ./adapter ./base-again
      dora-convert unmerge --in-place ./model ./adapter
    """
    if len(refs) < (2 if keywords["in_place"] else 3):
        raise click.UsageError("unmerge needs MERGED, ADAPTER and OUT, or MERGED and ADAPTER with --in-place.")
    from ..verbs.unmerge import unmerge as verb

    merged, *adapters = refs
    out = None if keywords["in_place"] else adapters.pop()
    report = verb(merged, adapters, out, **keywords)
    sink.show(report, report.out, parts)


def parts(report: UnmergeReport | DryRunReport, *, every: bool) -> Iterator[Table | str]:
    """Yield the report for people: the ledger, the tensors that are not proven, and a summary."""
    yield ledger_table(report, every=every)
    modules: Sequence[Recovered] = getattr(report, "modules", ())
    if unproven := [module for module in modules if not module.bit_exact]:
        worst = sorted(unproven, key=lambda module: module.lost / max(1, module.elements), reverse=True)
        yield _lost_table(cut(worst, every=every))
        yield from rest(worst, "tensors", every=every)
    *lines, out = summary(report)
    yield from lines
    if modules:
        yield _proven(modules)
    yield out


def _lost_table(modules: Sequence[Recovered]) -> Table:
    rows = [(module.name, f"{module.lost:,}", f"{module.lost / max(1, module.elements):.2%}") for module in modules]
    return table(("not proven to be the base's", ">elements lost to rounding", ">share"), rows)


def _proven(modules: Sequence[Recovered]) -> str:
    exact, lost = sum(module.bit_exact for module in modules), sum(module.lost for module in modules)
    text = f"{exact} of {len(modules)} recovered tensors are the base's, bit for bit, by their hashes"
    return f"{text}; rounding took {lost:,} elements" if lost else text
