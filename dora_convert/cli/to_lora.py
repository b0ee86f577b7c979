"""dora-convert to-lora."""

from __future__ import annotations

from typing import Any

import click

from . import options
from .made import run_verb


@click.command("to-lora")
@click.argument("refs", nargs=-1, metavar="[BASE] ADAPTER OUT", required=True)
@options.factoring
@options.adapters_out
@options.pushing
@options.select
@options.reading
@options.writing
@options.hub
@options.talk
def command(refs: tuple[str, ...], *, as_json: bool, quiet: bool, verbose: bool, **chosen: Any) -> None:
    """Make a plain LoRA of a DoRA or any other adapter, or a LoRA of another rank.

    BASE and ADAPTER are folders or Hub repos (org/name[@revision]). Without BASE, the base that the adapter names is
    used. OUT is a PEFT adapter with, for each module, the best factors of what ADAPTER changes. How good they are is
    said by exactly one of --rank, --energy and --max-error, and is measured.

    \b
    Examples:
      dora-convert to-lora ./base ./dora ./lora --rank 32
      dora-convert to-lora ./base ./lora ./smaller --max-error 0.01
    """
    if not 2 <= len(refs) <= 3:
        raise click.UsageError("to-lora needs an ADAPTER and OUT, and mostly a BASE before them.")
    from ..verbs.to_lora import to_lora

    base = refs[0] if len(refs) > 2 else None
    run_verb(to_lora, base, *refs[-2:], as_json=as_json, quiet=quiet, verbose=verbose, **chosen)
