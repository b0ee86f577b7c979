"""dora-convert unmerge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from . import options
from .sink import Sink, ledger_table, printable, summary, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..reports.merge import DryRunReport, Recovered, UnmergeReport

SHOWN = 10
"""How many tensors that are not proven are shown without --verbose."""


@click.command("unmerge")
@click.argument("refs", nargs=-1, metavar="MERGED ADAPTER... OUT", required=True)
@click.option(
    "--base",
    metavar="REF",
    help="The base itself, for what no record holds: DoRA's norms, what was replaced.",
)
@click.option(
    "--max-shard-size", metavar="SIZE", help="Such as 5GB or 4GiB; default the base's own sharding."
)
@options.compute
@click.option("--verify/--no-verify", default=True, help="Check the output before publishing it.")
@options.reading
@options.writing
@options.placing
@options.hub
@options.talk
def command(refs: tuple[str, ...], *, as_json: bool, quiet: bool, verbose: bool, **chosen: Any) -> None:
    """Take adapters out of a merged checkpoint again.

    MERGED is what merge made, with its record in MERGED/dora_convert; every ADAPTER is one that was merged. OUT is a new
    folder with the base: bit for bit after merge --undo exact, up to rounding otherwise. The report says how many
    tensors are proven to be the base's by their hashes.

    \b
    Examples:
      dora-convert merge ./base ./adapter ./merged --undo exact
      dora-convert unmerge ./merged ./adapter ./base-again
      dora-convert unmerge --in-place ./model ./adapter
    """
    if len(refs) < (2 if chosen["in_place"] else 3):
        raise click.UsageError(
            "unmerge needs MERGED, ADAPTER and OUT, or MERGED and ADAPTER with --in-place."
        )
    from ..verbs.unmerge import unmerge

    merged, *adapters = refs
    out = None if chosen["in_place"] else adapters.pop()
    sink = Sink(as_json=as_json, quiet=quiet, verbose=verbose)
    try:
        report = unmerge(merged, adapters, out, on_progress=sink.progress, on_notice=sink.notice, **chosen)
    finally:
        sink.close()
    sink.show(report, report.out, lambda every: parts(report, every=every))


def parts(report: UnmergeReport | DryRunReport, *, every: bool) -> Iterator[Table | str]:
    """The report for people: what was taken out, what is proven, and what is not."""
    yield ledger_table(report, every=every)
    modules: Sequence[Recovered] = getattr(report, "modules", ())
    if open_ := [module for module in modules if not module.bit_exact]:
        worst = sorted(open_, key=lambda module: module.lost / max(1, module.elements), reverse=True)
        yield _lost_table(worst if every else worst[:SHOWN])
        if len(worst) > SHOWN and not every:
            yield f"… and {len(worst) - SHOWN} tensors more (--verbose)"
    lines = summary(report)
    if modules:
        lines.insert(-1, _proven(modules))
    yield from map(printable, lines)


def _lost_table(modules: Sequence[Recovered]) -> Table:
    rows = [
        (module.name, f"{module.lost:,}", f"{module.lost / max(1, module.elements):.2%}")
        for module in modules
    ]
    return table(("not proven to be the base's", ">elements lost to rounding", ">share"), rows)


def _proven(modules: Sequence[Recovered]) -> str:
    exact, lost = sum(module.bit_exact for module in modules), sum(module.lost for module in modules)
    text = f"{exact} of {len(modules)} recovered tensors are the base's, bit for bit, by their hashes"
    return f"{text}; of {lost:,} elements rounding took what they were" if lost else text
