"""Hold the reports of from-lora, to-lora and extract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import Report


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

    base: str
    input: str
    out: str
    format: str
    warnings: tuple[str, ...]


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
