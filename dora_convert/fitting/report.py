"""What from-lora, to-lora and extract return, and what `--json` prints of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..reports.fitting import FittedModule, MadeDryRun, MadeReport
from ..settings import Settings
from ..sizes import peak_memory
from .jobs import FittingPlan, Result

if TYPE_CHECKING:  # which imports torch
    from .run import FittingRun


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


Describe = Callable[[str, Result], FittedModule]
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
