"""dora-convert merge."""

from __future__ import annotations

from typing import Any

import click

from . import options
from .sink import Sink


@click.command("merge")
@click.argument("refs", nargs=-1, metavar="[BASE] ADAPTER... OUT", required=True)
@options.strength
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    help="Of every floating tensor written; auto keeps each one's own.",
)
@click.option(
    "--max-shard-size", metavar="SIZE", help="Such as 5GB or 4GiB; default the base's own sharding."
)
@options.compute
@options.select
@click.option(
    "--undo",
    type=click.Choice(["norms", "exact", "none"]),
    help="What to keep so that the merge can be undone: norms (default; up to rounding) or exact (bit for bit).",
)
@click.option("--verify/--no-verify", default=True, help="Check a sample of the output before publishing it.")
@click.option(
    "--verify-outputs",
    is_flag=True,
    help="Run base + adapter and the output on sample prompts before publishing it.",
)
@options.matching
@options.reading
@options.base_model
@options.pushing
@click.option("--no-local", is_flag=True, help="With --push-to-hub: no OUT, nothing stays on this machine.")
@options.writing
@options.placing
@options.hub
@options.talk
def command(refs: tuple[str, ...], *, as_json: bool, quiet: bool, verbose: bool, **chosen: Any) -> None:
    """Fold LoRA and DoRA adapters into a base checkpoint.

    BASE and ADAPTER are folders or Hub repos (org/name[@revision]). Without BASE, the base that the adapter names is
    used. OUT is a new folder with the base's files, its weights merged, and a record of what was done in
    OUT/dora_convert.

    \b
    Examples:
      dora-convert merge ./base ./adapter ./merged
      dora-convert merge ./adapter ./merged --dry-run
      dora-convert merge --in-place ./model ./adapter
      dora-convert merge org/base ./style ./facts ./merged --weight 0.5 --weight 1
      dora-convert merge org/base me/adapter --push-to-hub me/merged --no-local
    """
    if len(refs) < (1 if chosen["no_local"] else 2):
        needed = (
            "a BASE and an ADAPTER"
            if chosen["in_place"]
            else "an ADAPTER and OUT, and mostly a BASE before them"
        )
        raise click.UsageError(f"merge needs {needed}.")
    from ..verbs.merge import merge

    nowhere = chosen["in_place"] or chosen["no_local"]
    inputs, out = (refs, None) if nowhere else (refs[:-1], refs[-1])
    base, adapters = (inputs[0], inputs[1:]) if len(inputs) > 1 else (None, inputs)
    sink = Sink(as_json=as_json, quiet=quiet, verbose=verbose)
    try:
        report = merge(base, adapters, out, on_progress=sink.progress, on_notice=sink.notice, **chosen)
    finally:
        sink.close()
    sink.result(report)
