"""dora-convert unmerge: the command."""

from __future__ import annotations

import click
from typing_extensions import Unpack

from ..options import UnmergeOptions
from . import REF, command, takes
from .sink import Sink


@command("unmerge")
@click.argument("refs", type=REF, nargs=-1, metavar="MERGED ADAPTER... OUT", required=True)
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
    sink.show(report, report.out)
