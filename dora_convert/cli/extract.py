"""dora-convert extract: the command."""

from __future__ import annotations

import click
from typing_extensions import Unpack

from ..options import ExtractOptions
from .adapter_report import show
from .options import takes
from .sink import Sink


@click.command("extract")
@click.argument("base")
@click.argument("tuned")
@click.argument("out")
@takes(ExtractOptions)
def command(base: str, tuned: str, out: str, *, sink: Sink, **keywords: Unpack[ExtractOptions]) -> None:
    """Make an adapter of a fine-tuned checkpoint.

    BASE and TUNED are folders or Hub repos (org/name[@revision]) with tensors of the same names. OUT is a
    PEFT adapter: factors for the linear weights that differ, and everything else that differs whole. Exactly
    one of --rank, --energy and --max-error sets the quality of the factors, which is measured.

    \b
    Examples:
      dora-convert extract ./base ./tuned ./dora --rank 16
      dora-convert extract ./base ./tuned ./lora --kind lora --max-error 0.1
    """
    from ..verbs.extract import extract

    show(sink, extract(base, tuned, out, **keywords))
