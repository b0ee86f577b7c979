"""Hold the reports of from-lora, to-lora and extract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__
from . import SCHEMA, Report


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
class MadeReport:
    """The report of a verb that fits an adapter."""

    command: str
    base: str
    input: str
    out: str
    format: str
    modules: tuple[FittedModule, ...]
    relative_error: float
    """The relative error over all modules together."""
    device: str
    compute_dtype: str
    bytes_written: int
    peak_memory_bytes: int | None
    resumed: bool
    warnings: tuple[str, ...]
    seconds: float
    details: Mapping[str, Any]
    """Fields that only this verb reports."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as `--json` prints it; details become fields beside the others."""
        return {"schema": SCHEMA, "version": __version__, **_flat(asdict(self))} | {
            "modules": [_flat(asdict(module)) for module in self.modules]
        }


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in values.items() if key != "details"}, **values["details"]}


@dataclass(frozen=True, kw_only=True)
class MadeDryRun(Report):
    """The report of a verb that would fit an adapter."""

    command: str
    base: str
    input: str
    out: str
    format: str
    plan: Mapping[str, Any]
    """Names of the modules, the most bytes of output, and bytes of memory."""
    warnings: tuple[str, ...]
    seconds: float
    dry_run: bool = True
