"""dora-convert from-lora, to-lora and extract: the commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from typing_extensions import Unpack

from ..options import ExtractOptions, FromLoraOptions, ToLoraOptions
from . import REF, command, takes
from .sink import Sink

if TYPE_CHECKING:
    from ..reports.fitting import MadeDryRun, MadeReport


@command("from-lora")
@click.argument("refs", type=REF, nargs=-1, metavar="[BASE] LORA OUT", required=True)
@takes(FromLoraOptions)
def from_lora(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[FromLoraOptions]) -> None:
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
    from ..verbs.from_lora import from_lora as verb

    *base, adapter, out = refs
    show(sink, verb(base[0] if base else None, adapter, out, **keywords))


@command("to-lora")
@click.argument("refs", type=REF, nargs=-1, metavar="[BASE] ADAPTER... OUT", required=True)
@takes(ToLoraOptions)
def to_lora(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[ToLoraOptions]) -> None:
    """Make a plain LoRA of a DoRA or any other adapter, or a LoRA of another rank.

    BASE and ADAPTER are folders or Hub repos (org/name[@revision]). Without BASE, the base that the adapter
    names is used. OUT is a PEFT adapter with, for each module, the best factors of ADAPTER's change. Exactly
    one of --rank, --energy and --max-error sets the quality of the factors, which is measured.

    \b
    Examples:
      dora-convert to-lora ./base ./dora ./lora --rank 32
      dora-convert to-lora ./base ./lora ./smaller --max-error 0.01
      dora-convert to-lora ./base ./style ./facts ./one --rank 64 --method ties --density 0.5
    """
    if len(refs) < 2:
        raise click.UsageError("to-lora needs an ADAPTER and OUT, and mostly a BASE before them.")
    from ..verbs.to_lora import to_lora as verb

    base, adapters = (refs[0], refs[1:-1]) if len(refs) > 2 else (None, refs[:-1])
    show(sink, verb(base, adapters, refs[-1], **keywords))


@command("extract")
@click.argument("base", type=REF)
@click.argument("tuned", type=REF)
@click.argument("out", type=REF)
@takes(ExtractOptions)
def extract(base: str, tuned: str, out: str, *, sink: Sink, **keywords: Unpack[ExtractOptions]) -> None:
    """Make an adapter of a fine-tuned checkpoint.

    BASE and TUNED are folders or Hub repos (org/name[@revision]) with tensors of the same names. OUT is a
    PEFT adapter: factors for the linear weights that differ, and everything else that differs whole. Exactly
    one of --rank, --energy and --max-error sets the quality of the factors, which is measured.

    \b
    Examples:
      dora-convert extract ./base ./tuned ./dora --rank 16
      dora-convert extract ./base ./tuned ./lora --kind lora --max-error 0.1
    """
    from ..verbs.extract import extract as verb

    show(sink, verb(base, tuned, out, **keywords))


def show(sink: Sink, report: MadeReport | MadeDryRun) -> None:
    """Print a report."""
    sink.show(report, report.out)
