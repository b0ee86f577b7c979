"""What from-lora, to-lora and extract return, and what `--json` prints of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..reports.merge import SCHEMA
from ..settings import Settings
from ..sizes import peak_memory
from .jobs import FittingPlan, Result

if TYPE_CHECKING:  # which imports torch
    from .run import FittingRun


@dataclass(frozen=True, kw_only=True)
class MadeModule:
    """One module of an adapter that was made, and how well it does what it was made of."""

    name: str
    rank: int
    relative_error: float
    """‖ΔW − ΔW'‖/‖ΔW‖, Frobenius, measured: ΔW is what the input changes, ΔW' what the adapter does."""
    details: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class MadeReport:
    """What a verb that writes an adapter did."""

    command: str
    base: str
    input: str
    out: str
    format: str
    modules: tuple[MadeModule, ...]
    relative_error: float
    """As a module's, over all of them."""
    device: str
    compute_dtype: str
    bytes_written: int
    peak_memory_bytes: int | None
    resumed: bool
    warnings: tuple[str, ...]
    seconds: float
    details: Mapping[str, Any]
    """What only this verb reports."""

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it; details stand beside the other fields."""
        return {"schema": SCHEMA, "version": __version__, **_flat(asdict(self))} | {
            "modules": [_flat(asdict(module)) for module in self.modules]
        }


@dataclass(frozen=True, kw_only=True)
class MadeDryRun:
    """What a verb that writes an adapter would do: modules, bytes at most, and the memory held."""

    command: str
    base: str
    input: str
    out: str
    format: str
    plan: Mapping[str, Any]
    warnings: tuple[str, ...]
    seconds: float
    dry_run: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        return {"schema": SCHEMA, "version": __version__, **asdict(self)}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in values.items() if key != "details"}, **values["details"]}


def _common(order: FittingPlan, settings: Settings, out: str) -> dict[str, Any]:
    return {
        "command": order.command,
        "base": order.bases[0].source.address,
        "input": order.sources[-1].address,
        "out": out,
        "format": order.format.NAME,
        "warnings": tuple(settings.warnings),
        "seconds": round(time.monotonic() - settings.started, 3),
    }


Describe = Callable[[str, Result], MadeModule]
"""A module of the report, from its name and its result."""


def report_of(
    order: FittingPlan, settings: Settings, out: str, run: FittingRun, describe: Describe, **details: Any
) -> MadeReport:
    """The report of a run that is over. Each result's facts hold `change`, ‖ΔW‖², and `lost`, what of it is not there."""
    facts = [result.facts for result in run.results.values()]
    return MadeReport(
        **_common(order, settings, out),
        modules=tuple(describe(name, result) for name, result in run.results.items()),
        relative_error=share(sum(fact["lost"] for fact in facts), sum(fact["change"] for fact in facts)),
        device=str(run.spec.device),
        compute_dtype=run.spec.compute_name,
        bytes_written=run.written,
        peak_memory_bytes=peak_memory(),
        resumed=run.resumed,
        details=details,
    )


def share(lost: float, change: float) -> float:
    """The relative error whose squares these are; 0 where nothing changes."""
    return float((lost / change) ** 0.5) if change else 0.0


def dry_run_of(order: FittingPlan, settings: Settings, out: str, **plan: Any) -> MadeDryRun:
    """The report of an order that is not carried out; UsageError for a budget that would not do."""
    settings.check_memory(order.memory)
    numbers = {
        "modules": [job.name for job in order.jobs],
        "bytes_out": order.bytes_out,
        "memory": min(settings.max_memory, settings.workers * order.memory),
        "least_memory": order.memory,
        **plan,
    }
    return MadeDryRun(**_common(order, settings, out), plan=numbers)
