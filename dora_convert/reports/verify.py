"""Hold the reports of verify: of the weights, and of the models' outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import Report


@dataclass(frozen=True, kw_only=True)
class CheckedModule:
    """One tensor that an adapter changes."""

    name: str
    elements: int
    wrong_elements: int
    """Elements that no correct rounding explains."""
    max_ulp: int
    """Largest distance from the rounded float64 result, in units in the last place of the merged dtype."""
    output_error: float | None
    """Relative error of W'x against the adapter's own forward, over the sample inputs."""
    output_floor: float | None
    """The same error if every element were rounded correctly."""
    cause: str | None = None


@dataclass(frozen=True, kw_only=True)
class Untouched:
    """Number of tensors that no adapter changes, and how many are identical to the base's."""

    tensors: int
    identical: int


@dataclass(frozen=True, kw_only=True)
class ComparisonReport(Report):
    """The fields that both levels of verify share."""

    base: str
    adapters: tuple[str, ...]
    merged: str
    verdict: str  # agree | differ
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    """Differences that do not count."""
    warnings: tuple[str, ...]
    command: str = "verify"


@dataclass(frozen=True, kw_only=True)
class VerifyReport(ComparisonReport):
    """The comparison of a merged checkpoint's weights with base and adapters."""

    modules: tuple[CheckedModule, ...]
    untouched: Untouched
    ledger: tuple[Mapping[str, Any], ...]
    level: str = "weights"


@dataclass(frozen=True, kw_only=True)
class OutputsReport(ComparisonReport):
    """The comparison of a merged checkpoint's outputs with those of base and adapters, on sample prompts."""

    architecture: str
    prompts: int
    positions: int
    """Outputs compared: one a token for generating models, one a prompt for classifiers."""
    max_abs_logit_error: float
    mean_abs_logit_error: float
    rounding_floor: float
    """Largest difference that rounding to the merged dtype, or float32 arithmetic, leaves."""
    mean_rounding_floor: float
    mean_margin: float
    """Largest allowed mean difference, in multiples of its floor."""
    max_margin: float
    """Largest allowed maximum difference, in multiples of its floor."""
    mean_kl: float
    """KL(reference ‖ merged) in nats, averaged over positions."""
    top1_agreement: float
    """Share of positions where both models have the same largest output."""
    greedy_agreement: float | None
    """Share of prompts continued with the same tokens; None for models that do not generate."""
    device: str
    offloaded: bool
    """True if weights were read from their files block by block."""
    memory_bytes: int
    """Estimate of the memory needed, beyond Python and its libraries."""
    peak_memory_bytes: int | None
    level: str = "outputs"


def figures(report: OutputsReport) -> Iterator[tuple[str, str, str, str]]:
    """Yield rows for people: name, measured value, value of rounding alone, and largest allowed value."""
    for name, error, floor, margin in (
        ("mean |Δ|", report.mean_abs_logit_error, report.mean_rounding_floor, report.mean_margin),
        ("max |Δ|", report.max_abs_logit_error, report.rounding_floor, report.max_margin),
    ):
        yield name, f"{error:.2e}", f"{floor:.2e}", f"{margin * floor:.2e}"
    yield "mean KL", f"{report.mean_kl:.1e}", "", ""
    yield "same top-1", f"{report.top1_agreement:.2%}", "", ""
    if report.greedy_agreement is not None:
        yield "same continuation", f"{report.greedy_agreement:.0%} of prompts", "", ""
