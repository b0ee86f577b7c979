"""dora-convert verify: the command."""

from __future__ import annotations

import click
from typing_extensions import Unpack

from ..options import VerifyOptions
from . import REF, command, takes
from .sink import Sink


@command("verify")
@click.argument("refs", type=REF, nargs=-1, metavar="BASE ADAPTER... MERGED", required=True)
@takes(VerifyOptions)
def verify(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[VerifyOptions]) -> int:
    """Compare what MERGED does with what BASE and ADAPTER do.

    Every element is compared with the float64 result, whichever tool wrote MERGED, and every module's outputs
    with the adapter's own. Rounding is told from mistakes, and known mistakes are named. The exit code is 0
    if they agree, 1 if they differ, 2 if that cannot be decided.

    With --level outputs, base + adapter, as PEFT runs them, and MERGED are run on prompts, and their logits
    are compared. That needs pip install 'dora-convert[verify]'.

    \b
    Examples:
      dora-convert verify ./base ./adapter ./merged
      dora-convert verify ./base ./style ./facts ./merged --weight 0.5 --weight 1
      dora-convert verify ./base ./adapter ./merged --level outputs --prompt "Once upon a time"
    """
    if len(refs) < 3:
        raise click.UsageError("verify needs BASE, ADAPTER and MERGED.")
    from ..verbs.verify import verify as verb

    base, *adapters, merged = refs
    report = verb(base, adapters, merged, **keywords)
    sink.show(report, report.verdict)
    return 0 if report.verdict == "agree" else 1
