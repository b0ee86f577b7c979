"""Hold the reports of verify: of the weights, and of the models' outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import Report, Table, cut, rest, table

SHOWN_PROMPTS = 3
LONGEST_PROMPT = 40
"""Characters of a prompt in a table."""


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

    def parts(self, *, every: bool) -> Iterator[Table | str]:
        """Yield the worst modules first, then the verdict."""
        worst = sorted(self.modules, key=_badness, reverse=True)
        if worst:
            yield modules_table(cut(worst, every=every))
        yield from rest(worst, "modules", every=every)
        yield from about(self, every=every)


@dataclass(frozen=True)
class Continuation:
    """A prompt, and its likeliest continuations by base + adapter and by the merged model, as text."""

    prompt: str
    reference: str
    merged: str
    """The merged model's choice after each token of the reference."""


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
    continuations: tuple[Continuation, ...] = ()
    """Both models' continuations of each prompt; empty without a tokenizer, or if the model does not generate."""
    level: str = "outputs"

    def parts(self, *, every: bool) -> Iterator[Table | str]:
        """Yield the differences of the outputs, the continuations, and the verdict; `every` lists all prompts."""
        if self.continuations:
            differ = sorted(self.continuations, key=lambda each: each.reference == each.merged)
            rows = [(shortened(each.prompt), each.reference, each.merged) for each in differ]
            yield table(("prompt", "base + adapter", "merged"), rows if every else rows[:SHOWN_PROMPTS])
        yield table(("outputs", ">difference", ">rounding alone", ">passes up to"), figures(self))
        positions = f"{self.positions:,} positions of {self.architecture}"
        yield f"{self.prompts} prompts, {positions} on {self.device}"
        yield from (f"problem: {problem}" for problem in self.problems)
        yield from (f"note: {note}" for note in self.notes)
        yield f"verdict: {self.verdict}"


def shortened(text: str) -> str:
    """Return the end of a prompt, which a continuation follows."""
    return text if len(text) <= LONGEST_PROMPT else f"…{text[-LONGEST_PROMPT:]}"


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
