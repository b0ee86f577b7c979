"""dora-convert verify: the command, and its report for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
from typing_extensions import Unpack

from ..options import VerifyOptions
from ..reports.verify import CheckedModule, OutputsReport, VerifyReport, figures
from . import takes
from .sink import Sink, cut, rest, table

if TYPE_CHECKING:
    from rich.table import Table


@click.command("verify")
@click.argument("refs", nargs=-1, metavar="BASE ADAPTER... MERGED", required=True)
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
    sink.show(report, report.verdict, parts)
    return 0 if report.verdict == "agree" else 1


def parts(report: VerifyReport | OutputsReport, *, every: bool) -> Iterator[Table | str]:
    """Yield the report for people: the worst modules first, then the verdict."""
    if isinstance(report, OutputsReport):
        yield from _outputs(report)
        return
    worst = sorted(report.modules, key=_badness, reverse=True)
    if worst:
        yield modules_table(cut(worst, every=every))
    yield from rest(worst, "modules", every=every)
    yield from about(report, every=every)


def _outputs(report: OutputsReport) -> Iterator[Table | str]:
    yield table(("outputs", ">difference", ">rounding alone", ">passes up to"), figures(report))
    positions = f"{report.positions:,} positions of {report.architecture}"
    yield f"{report.prompts} prompts, {positions} on {report.device}"
    yield from (f"problem: {problem}" for problem in report.problems)
    yield from (f"note: {note}" for note in report.notes)
    yield f"verdict: {report.verdict}"


def _badness(module: CheckedModule) -> tuple[int, float]:
    return module.wrong_elements, module.output_error or 0.0


def modules_table(modules: Sequence[CheckedModule]) -> Table:
    """Return each module's errors; the error of rounding alone stands beside the output's error."""
    rows = [
        (
            module.name.removesuffix(".weight"),
            f"{module.wrong_elements:,}",
            module.max_ulp,
            _share(module.output_error),
            _share(module.output_floor),
        )
        for module in modules
    ]
    return table(("module", ">wrong", ">max ulp", ">output error", ">rounding alone"), rows)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def about(report: VerifyReport, *, every: bool) -> Iterator[str]:
    """Yield the verdict and its reasons, in a few lines."""
    untouched = report.untouched
    elements = sum(module.elements for module in report.modules)
    wrong = sum(module.wrong_elements for module in report.modules)
    yield f"{len(report.modules)} modules: {wrong:,} of {elements:,} elements wrong"
    yield f"{untouched.tensors} untouched tensors: {untouched.identical} identical"
    yield from (f"problem: {problem}" for problem in cut(report.problems, every=every))
    yield from rest(report.problems, "problems", every=every)
    yield from (f"note: {note}" for note in cut(report.notes, every=every))
    yield f"verdict: {report.verdict}"
