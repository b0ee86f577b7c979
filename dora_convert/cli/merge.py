"""dora-convert merge: the command."""

from __future__ import annotations

import click
from typing_extensions import Unpack

from ..options import MergeOptions
from . import takes
from .sink import Sink


@click.command("merge")
@click.argument("refs", nargs=-1, metavar="[BASE] ADAPTER... OUT", required=True)
@takes(MergeOptions)
def merge(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[MergeOptions]) -> None:
    """Fold LoRA and DoRA adapters into a base checkpoint.

    BASE and ADAPTER are folders or Hub repos (org/name[@revision]). Without BASE, the base that the adapter
    names is used. OUT is a new folder with the base's files, its weights merged, and a record of what was
    done in OUT/dora_convert.

    \b
    Examples:
      dora-convert merge ./base ./adapter ./merged
      dora-convert merge ./adapter ./merged --dry-run
      dora-convert merge --in-place ./model ./adapter
      dora-convert merge org/base ./style ./facts ./merged --weight 0.5 --weight 1
      dora-convert merge org/base me/adapter --push-to-hub me/merged --no-local
    """
    if len(refs) < (1 if keywords["no_local"] else 2):
        inputs_and_out = "an ADAPTER and OUT, and mostly a BASE before them"
        raise click.UsageError(f"merge needs {'a BASE and an ADAPTER' if keywords['in_place'] else inputs_and_out}.")
    from ..verbs.merge import merge as verb

    has_out = not (keywords["in_place"] or keywords["no_local"])
    inputs, out = (refs[:-1], refs[-1]) if has_out else (refs, None)
    base, adapters = (inputs[0], inputs[1:]) if len(inputs) > 1 else (None, inputs)
    report = verb(base, adapters, out, **keywords)
    sink.show(report, report.out)
