"""dora-convert convert: the command."""

from __future__ import annotations

import click
from typing_extensions import Unpack

from ..options import ConvertOptions
from . import REF, command, takes
from .sink import Sink


@command("convert")
@click.argument("adapter", type=REF)
@click.argument("out", type=REF)
@takes(ConvertOptions)
def convert(adapter: str, out: str, *, sink: Sink, **keywords: Unpack[ConvertOptions]) -> None:
    """Write an adapter in another tool's format: the same change of the same weights.

    ADAPTER is a folder, a file or a Hub repo, in any format that is read. OUT is a folder. BASE is needed where
    names or the order of rows depend on the model. What the new format cannot hold is refused by name.

    \b
    Examples:
      dora-convert convert ./adapter ./for-mlx --to mlx
      dora-convert convert ./lora.safetensors ./peft --to peft --base ./base
    """
    from ..verbs.convert import convert as verb

    report = verb(adapter, out, **keywords)
    sink.show(report, report.out)
