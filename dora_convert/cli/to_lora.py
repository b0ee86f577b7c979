"""dora-convert to-lora: the command."""

from __future__ import annotations

import click
from typing_extensions import Unpack

from ..options import ToLoraOptions
from .adapter_report import show
from .options import takes
from .sink import Sink


@click.command("to-lora")
@click.argument("refs", nargs=-1, metavar="[BASE] ADAPTER OUT", required=True)
@takes(ToLoraOptions)
def command(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[ToLoraOptions]) -> None:
    """Make a plain LoRA of a DoRA or any other adapter, or a LoRA of another rank.

    BASE and ADAPTER are folders or Hub repos (org/name[@revision]). Without BASE, the base that the adapter
    names is used. OUT is a PEFT adapter with, for each module, the best factors of ADAPTER's change. Exactly
    one of --rank, --energy and --max-error sets the quality of the factors, which is measured.

    \b
    Examples:
      dora-convert to-lora ./base ./dora ./lora --rank 32
      dora-convert to-lora ./base ./lora ./smaller --max-error 0.01
    """
    if not 2 <= len(refs) <= 3:
        raise click.UsageError("to-lora needs an ADAPTER and OUT, and mostly a BASE before them.")
    from ..verbs.to_lora import to_lora

    *base, adapter, out = refs
    show(sink, to_lora(base[0] if base else None, adapter, out, **keywords))
