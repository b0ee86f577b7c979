"""Hold the reports of from-lora, to-lora and extract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..settings import format_size
from . import Report, Table, joined, table
from .merge import fold_name, written

COLUMNS = {"output_error": "output error", "lora_error": "LoRA's error"}
"""Further numbers of a module, for the verbs that report them."""


@dataclass(frozen=True, kw_only=True)
class FittedModule:
    """One module of a fitted adapter, and its error against the input."""

    name: str
    rank: int
    relative_error: float
    """‖ΔW − ΔW'‖/‖ΔW‖ (Frobenius, measured): ΔW is the input's change of W, ΔW' the fitted adapter's."""
    details: Mapping[str, Any]
    """Fields that only this verb reports."""


@dataclass(frozen=True, kw_only=True)
class FittingReport(Report):
    """The fields that a run of a plan and its dry run share."""

    base: str | None
    input: str
    out: str
    format: str
    warnings: tuple[str, ...]

    def parts(self, *, every: bool) -> Iterator[Table | str]:
        """Yield the modules and a summary."""
        values = self.to_dict()
        if "plan" in values:
            yield from _planned(values["plan"])
        else:
            yield _modules_table(values["modules"], every=every)
            yield from _summary(values, every=every)
        yield f"out: {self.out}"


@dataclass(frozen=True, kw_only=True)
class MadeReport(FittingReport):
    """The report of a verb that fits an adapter."""

    modules: tuple[FittedModule, ...]
    relative_error: float
    """The relative error over all modules together."""
    device: str
    compute_dtype: str
    bytes_written: int
    peak_memory_bytes: int | None
    resumed: bool
    details: Mapping[str, Any]
    """Fields that only this verb reports."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as `--json` prints it; details become fields beside the others."""
        values = super().to_dict()
        for each in (values, *values["modules"]):
            each.update(each.pop("details"))
        return values


@dataclass(frozen=True, kw_only=True)
class MadeDryRun(FittingReport):
    """The report of a verb that would fit an adapter."""

    plan: Mapping[str, Any]
    """Names of the modules, the most bytes of output, and bytes of memory."""
    dry_run: bool = True


def _planned(plan: dict[str, Any]) -> Iterator[str]:
    yield f"{len(plan['modules'])} modules; nothing was written"
    yield (
        f"would write at most {format_size(plan['bytes_out'])}, holding {format_size(plan['memory'])} "
        f"in memory (at least {format_size(plan['least_memory'])})"
    )


def _modules_table(modules: list[dict[str, Any]], *, every: bool) -> Table:
    """Return the ranks and the largest errors by kind of module; `every` lists each module."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for module in modules:
        name = module["name"].removesuffix(".weight")
        groups.setdefault(name if every else fold_name(name), []).append(module)
    more = [key for key in COLUMNS if any(key in module for module in modules)]
    rows = [
        (name, len(group), _ranks(group), *(_largest(group, key) for key in ("relative_error", *more)))
        for name, group in groups.items()
    ]
    columns = ("module", ">n", ">rank", ">largest error", *(f">{COLUMNS[key]}" for key in more))
    return table(columns, rows)


def _ranks(modules: list[dict[str, Any]]) -> str:
    ranks = sorted({module["rank"] for module in modules})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} – {ranks[-1]}"


def _largest(modules: list[dict[str, Any]], key: str) -> str:
    values = [module[key] for module in modules if module.get(key) is not None]
    return f"{max(values):.2g}" if values else ""


def _summary(report: dict[str, Any], *, every: bool) -> Iterator[str]:
    """Yield the error over all modules, sizes, and the upload."""
    yield f"relative error over all modules: {report['relative_error']:.2g}"
    if names := report.get("left_as_lora"):
        yield f"left as LoRA in OUT/lora: {joined(names, every=every)}"
    yield written(report)
    if pushed := report.get("pushed"):
        yield f"pushed: {pushed['url']}"
