"""Make the reports of from-lora, to-lora and extract."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..reports.fitting import FittedModule, MadeDryRun, MadeReport
from ..settings import Settings, peak_memory
from .jobs import FittingPlan

if TYPE_CHECKING:  # which imports torch
    from .run import FittingRun


def _common(plan: FittingPlan, settings: Settings, out: str) -> dict[str, Any]:
    return {
        "command": plan.command,
        "base": plan.bases[0].source.address,
        "input": plan.sources[-1].address,
        "out": out,
        "format": plan.format.NAME,
        "warnings": tuple(settings.warnings),
        "seconds": round(time.monotonic() - settings.started, 3),
    }


def report_of(
    plan: FittingPlan,
    settings: Settings,
    out: str,
    run: FittingRun,
    describe: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    **details: Any,
) -> MadeReport:
    """Return the report of a run. A result's facts hold `change`, ‖ΔW‖², and `lost`, ‖ΔW − ΔW'‖²."""
    facts = {name: result.facts for name, result in run.results.items()}
    return MadeReport(
        **_common(plan, settings, out),
        modules=tuple(
            FittedModule(name=name, rank=fact["rank"], relative_error=error_of([fact]), details=describe(fact))
            for name, fact in facts.items()
        ),
        relative_error=error_of(facts.values()),
        device=str(run.spec.device),
        compute_dtype=run.spec.compute_name,
        bytes_written=run.written,
        peak_memory_bytes=peak_memory(),
        resumed=run.resumed,
        details=details,
    )


def error_of(facts: Collection[Mapping[str, Any]], lost: str = "lost", change: str = "change") -> float:
    """Return the relative error of several modules, √(Σ lost / Σ change); 0 if nothing changes."""
    total = sum(fact[change] for fact in facts)
    return float((sum(fact[lost] for fact in facts) / total) ** 0.5) if total else 0.0


def dry_run_of(plan: FittingPlan, settings: Settings, out: str, **details: Any) -> MadeDryRun:
    """Return the report of a plan that is not run; UsageError for a budget that does not suffice."""
    settings.check_memory(plan.memory)
    numbers = {
        "modules": [job.name for job in plan.jobs],
        "bytes_out": plan.bytes_out,
        "memory": min(settings.max_memory, settings.workers * plan.memory),
        "least_memory": plan.memory,
        **details,
    }
    return MadeDryRun(**_common(plan, settings, out), plan=numbers)
