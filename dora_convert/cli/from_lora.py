"""dora-convert from-lora: the command."""

from __future__ import annotations

import click
from typing_extensions import Unpack

from ..options import FromLoraOptions
from .adapter_report import show
from .options import takes
from .sink import Sink


@click.command("from-lora")
@click.argument("refs", nargs=-1, metavar="[BASE] LORA OUT", required=True)
@takes(FromLoraOptions)
def command(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[FromLoraOptions]) -> None:
    """Make a DoRA of a LoRA, with the same outputs.

    BASE and LORA are folders or Hub repos (org/name[@revision]). Without BASE, the base that the adapter
    names is used. OUT is a PEFT adapter: the same factors, and for each module the magnitude m = ‖W + sBA‖.

    \b
    Examples:
      dora-convert from-lora ./base ./lora ./dora
      dora-convert from-lora ./lora ./dora --init pretrained
    """
    if not 2 <= len(refs) <= 3:
        raise click.UsageError("from-lora needs a LORA and OUT, and mostly a BASE before them.")
    from ..verbs.from_lora import from_lora

    *base, adapter, out = refs
    show(sink, from_lora(base[0] if base else None, adapter, out, **keywords))
