"""dora-convert analyze: the command."""

from __future__ import annotations

import click
from typing_extensions import Unpack

from ..options import AnalyzeOptions
from . import REF, command, takes
from .sink import Sink


@command("analyze")
@click.argument("refs", type=REF, nargs=-1, metavar="BASE TUNED...", required=True)
@takes(AnalyzeOptions)
def analyze(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[AnalyzeOptions]) -> None:
    """Measure how far training moved each weight, in magnitude (ΔM) and in direction (ΔD).

    TUNED are checkpoints or adapters, the steps of one training in their order; a Trainer's folder stands for
    the folders checkpoint-N inside. ΔM and ΔD are those of the DoRA paper: the mean over the rows of W of
    |‖w'‖ − ‖w‖| and of 1 − cos(w', w). Two adapters are also compared with each other.

    \b
    Examples:
      dora-convert analyze ./base ./adapter
      dora-convert analyze ./base ./trainer-output --report moved.html
      dora-convert analyze org/base ./adapter ./another --top 20 --csv moved.csv
    """
    if len(refs) < 2:
        raise click.UsageError("analyze needs BASE and one TUNED or more.")
    from ..verbs.analyze import analyze as verb

    base, *tuned = refs
    report = verb(base, tuned, **keywords)
    sink.show(report, report.short)
