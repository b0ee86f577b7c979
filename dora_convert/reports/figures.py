"""What `verify --level outputs` found, as rows for people."""

from __future__ import annotations

from collections.abc import Iterator

from .verify import OutputsReport

Row = tuple[str, str, str, str]


def figures(report: OutputsReport) -> Iterator[Row]:
    """What was measured, on the merged model and for rounding alone, and how much would have passed."""
    for name, error, floor, margin in (
        ("mean |Δ|", report.mean_abs_logit_error, report.mean_rounding_floor, report.mean_margin),
        ("max |Δ|", report.max_abs_logit_error, report.rounding_floor, report.max_margin),
    ):
        yield name, f"{error:.2e}", f"{floor:.2e}", f"{margin * floor:.2e}"
    yield "mean KL", f"{report.mean_kl:.1e}", "", ""
    yield "same top-1", f"{report.top1_agreement:.2%}", "", ""
    if report.greedy_agreement is not None:
        yield "same continuation", f"{report.greedy_agreement:.0%} of prompts", "", ""
