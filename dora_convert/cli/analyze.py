"""dora-convert analyze: the command, and its report for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
from typing_extensions import Unpack

from ..options import AnalyzeOptions
from ..reports.analyze import AnalyzeReport, Collision, KindCorrelation, Point, TunedStep
from . import takes
from .sink import Sink, cut, rest, table

if TYPE_CHECKING:
    from rich.table import Table


@click.command("analyze")
@click.argument("refs", nargs=-1, metavar="BASE TUNED...", required=True)
@takes(AnalyzeOptions)
def analyze(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[AnalyzeOptions]) -> None:
    """Measure how far training moved each weight, in magnitude (ΔM) and in direction (ΔD).

    TUNED are checkpoints or adapters, the steps of one training in their order; a Trainer's folder stands for
    the folders checkpoint-N inside. ΔM and ΔD are those of the DoRA paper: the mean over the rows of W of
    |‖w'‖ − ‖w‖| and of 1 − cos(w', w). Two adapters are also compared with each other.

    \b
    Examples:
      dora-convert analyze ./base ./adapter
      dora-convert analyze ./base ./trainer-output --report moved.html
      dora-convert analyze org/base ./adapter ./another --top 20 --csv moved.csv
    """
    if len(refs) < 2:
        raise click.UsageError("analyze needs BASE and one TUNED or more.")
    from ..verbs.analyze import analyze as verb

    base, *tuned = refs
    report = verb(base, tuned, **keywords)
    sink.show(report, _short(report), parts)


def _short(report: AnalyzeReport) -> str:
    """Return the answer in a line: the relative change of the last step."""
    if not report.tuned:
        return "\n".join(f"{share:.4%}" for share in report.trainable_share.values())
    return _number(report.tuned[-1].relative_change)


def parts(report: AnalyzeReport, *, every: bool) -> Iterator[Table | str]:
    """Yield the report for people: the modules that moved most, correlations, two adapters, and a few lines."""
    last = report.tuned[-1].checkpoint if report.tuned else ""
    points = sorted((point for point in report.points if point.checkpoint == last), key=_moved, reverse=True)
    shown = points if every else points[: report.top]
    if shown:
        yield points_table(shown)
    if len(points) > len(shown):
        yield f"… and {len(points) - len(shown)} modules more (--top, --verbose)"
    if report.correlation:
        yield correlations_table(report)
        yield from (f"{kind}: {each.note}" for kind, each in report.correlation.items() if each.note)
    if report.collision:
        worst = sorted(report.collision, key=_against)
        yield collisions_table(worst if every else worst[: report.top])
    yield from (about_step(step) for step in report.tuned)
    yield from _vectors(report, every=every)
    if not report.tuned:
        yield from (f"{name}: {share:.4%} of the parameters trained" for name, share in report.trainable_share.items())
    yield from (f"note: {note}" for note in report.notes)


def _moved(point: Point) -> float:
    return point.relative_change or 0.0


def _against(collision: Collision) -> float:
    return 2.0 if collision.cosine is None else collision.cosine


def points_table(points: Sequence[Point]) -> Table:
    """Return the movement of some modules."""
    rows = [
        (
            point.module,
            f"{point.delta_magnitude:.3g}",
            f"{point.delta_direction:.3g}",
            _number(point.relative_change),
            _rank(point.stable_rank, estimated=point.stable_rank_estimated),
            _rank(point.effective_rank),
            _ratio(point),
            _percent(point.lost),
        )
        for point in points
    ]
    heads = (">ΔM", ">ΔD", ">‖ΔW‖/‖W‖", ">stable rank", ">effective rank", ">‖w'‖/‖w‖, 5–95 %", ">lost")
    return table(("module", *heads), rows)


def correlations_table(report: AnalyzeReport) -> Table:
    """Return the correlation of ΔM and ΔD by kind of module."""
    rows = [(kind, each.points, _signed(each.r), _interval(each)) for kind, each in report.correlation.items()]
    return table(("correlation of ΔD and ΔM", ">points", ">r", ">95 %"), rows)


def collisions_table(collisions: Sequence[Collision]) -> Table:
    """Return the agreement of two adapters, the worst first."""
    rows = [(each.module, _signed(each.cosine), _percent(each.sign_conflicts)) for each in collisions]
    return table(("both adapters change", ">cosine", ">opposite signs"), rows)


def about_step(step: TunedStep) -> str:
    """Return the figures of one step over all matrices, in a line."""
    share = "" if step.trainable_share is None else f", {step.trainable_share:.3%} of the parameters trained"
    return (
        f"{step.title} ({step.kind}, step {step.step}): {step.modules} matrices, "
        f"‖ΔW‖/‖W‖ {_number(step.relative_change)}, rounding loses {_percent(step.lost)}{share}"
    )


def _vectors(report: AnalyzeReport, *, every: bool) -> Iterator[str]:
    """Yield the vectors that moved."""
    last = report.tuned[-1].checkpoint if report.tuned else ""
    moved = [each for each in report.vectors if each.checkpoint == last]
    moved.sort(key=lambda each: -(each.relative_change or 0.0))
    yield from (f"vector {each.tensor}: ‖Δw‖/‖w‖ {_number(each.relative_change)}" for each in cut(moved, every=every))
    yield from rest(moved, "vectors", every=every)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _rank(value: float | None, *, estimated: bool = False) -> str:
    return "–" if value is None else f"{'≈' * estimated}{value:.1f}"


def _ratio(point: Point) -> str:
    ratio = point.norm_ratio
    return "–" if ratio is None else f"{ratio['p5']:.3f}–{ratio['p95']:.3f}"


def _interval(each: KindCorrelation) -> str:
    return "–" if each.low is None or each.high is None else f"{each.low:+.2f} to {each.high:+.2f}"
