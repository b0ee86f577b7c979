"""dora-convert inspect: the command."""

from __future__ import annotations

import click
from typing_extensions import Unpack

from ..options import InspectOptions
from . import REF, command, takes
from .sink import Sink


@command("inspect")
@click.argument("ref", type=REF)
@click.option("--base", type=REF, metavar="REF", help="Show the place of each adapter tensor in this base.")
@takes(InspectOptions)
def inspect(ref: str, *, sink: Sink, base: str | None, **keywords: Unpack[InspectOptions]) -> None:
    """Describe an adapter or a checkpoint from its headers, never from its weights.

    REF is a folder, a single weight file or a Hub repo (org/name[@revision]). Of a model on the Hub, only the
    headers of its weight files are downloaded.

    \b
    Examples:
      dora-convert inspect ./adapter
      dora-convert inspect ./adapter --base org/base
      dora-convert inspect ./adapter --report adapter.html
      dora-convert inspect org/base --json
    """
    from ..verbs.inspect import inspect as verb

    report = verb(ref, base, **keywords)
    sink.show(report, f"{report.kind} {report.title}")
