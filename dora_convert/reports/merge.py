"""Hold the reports of merge, of unmerge and of their dry runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from ..errors import MalformedError
from ..settings import Settings, peak_memory
from . import Report

if TYPE_CHECKING:
    from ..engine.precision import ComputeSpec
    from ..output.finished import Verdict
    from ..plan.plan import Plan
    from .push import Pushed


@dataclass(frozen=True, kw_only=True)
class PlanReport(Report):
    """The fields that a run of a plan and its dry run share."""

    command: str
    base: str
    adapters: tuple[str, ...]
    out: str
    tensors: Mapping[str, int]
    """Output tensors by fate."""
    ledger: tuple[Mapping[str, Any], ...]
    """The fate of every adapter tensor."""
    undo: str
    warnings: tuple[str, ...]
    left_behind: tuple[str, ...]
    """Files of the base that are not copied."""
    seconds: float


def _common(plan: Plan, settings: Settings, out: str) -> dict[str, Any]:
    return {
        "command": "merge",
        "base": plan.base.source.address,
        "adapters": tuple(adapter.source.address for adapter in plan.adapters),
        "out": out,
        "tensors": plan.counts(),
        "ledger": tuple(entry.to_dict() for entry in plan.ledger),
        "undo": plan.options.undo,
        "warnings": tuple(settings.warnings),
        "left_behind": plan.base.left_behind,
        "seconds": round(time.monotonic() - settings.started, 3),
    }


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The self-check: elements compared, elements outside the bound, and the largest distance in ulps."""

    checked: int
    wrong_elements: int
    max_ulp: int


@dataclass(frozen=True, kw_only=True)
class MergeReport(PlanReport):
    """The report of a finished merge."""

    device: str
    compute_dtype: str
    bytes_written: int
    peak_memory_bytes: int | None
    resumed: bool
    verified: Verified | None
    """None for a merge without the self-check."""
    lost: float | None
    """Share of the change's norm that rounding took, estimated on the self-check's sample."""
    pushed: Pushed | None = None
    outputs: Mapping[str, Any] | None = None
    """The report of `verify --level outputs` on the merged model; None if no model was run."""

    @classmethod
    def of(
        cls,
        plan: Plan,
        settings: Settings,
        *,
        out: str,
        spec: ComputeSpec,
        verdict: Verdict | None,
        written: int,
        resumed: bool,
        pushed: Pushed | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> MergeReport:
        """Return the report of a finished run of a plan; `written` is the number of bytes written."""
        verified = None
        if verdict:
            verified = Verified(checked=verdict.checked, wrong_elements=verdict.wrong, max_ulp=verdict.max_ulp)
        return cls(
            **_common(plan, settings, out),
            device=str(spec.device),
            compute_dtype=spec.compute_name,
            bytes_written=written,
            peak_memory_bytes=peak_memory(),
            resumed=resumed,
            verified=verified,
            lost=verdict.lost if verdict else None,
            pushed=pushed,
            outputs=outputs,
        )

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Return the report that `to_dict` turned into `values`, marked as resumed.

        Raises MalformedError if a field is missing.
        """
        try:
            fields = {name: values[name] for name in cls.__dataclass_fields__}
            fields["verified"] = values["verified"] and Verified(**values["verified"])
            if "modules" in fields:
                fields["modules"] = tuple(Recovered(**module) for module in values["modules"])
        except (KeyError, TypeError) as error:
            raise MalformedError(
                f"The journal of the finished run does not hold a complete report: {error!r}."
            ) from error
        return cls(**fields | {"resumed": True})


@dataclass(frozen=True)
class Recovered:
    """One tensor that a merge had changed, after the unmerge."""

    name: str
    bit_exact: bool
    """True if its hash proves that it equals the base's tensor."""
    lost: int
    """Elements that are ambiguous: several values of the base were merged into the same value."""
    elements: int


@dataclass(frozen=True, kw_only=True)
class UnmergeReport(MergeReport):
    """The report of a finished unmerge."""

    merged: str
    exact: Mapping[str, int]
    """`tensors`: recovered tensors; `bit_exact`: recovered tensors proven equal to the base's by hash."""
    modules: tuple[Recovered, ...]

    @classmethod
    def of_run(cls, run: MergeReport, *, base: str, undo: str, modules: Sequence[Recovered]) -> UnmergeReport:
        """Return the report of an unmerge from the report of its run, whose base is the merged checkpoint."""
        fields = {name: getattr(run, name) for name in MergeReport.__dataclass_fields__}
        fields |= {"command": "unmerge", "base": base, "merged": run.base, "undo": undo}
        exact = sum(module.bit_exact for module in modules)
        return cls(**fields, exact={"tensors": len(modules), "bit_exact": exact}, modules=tuple(modules))


@dataclass(frozen=True, kw_only=True)
class DryRunReport(PlanReport):
    """The report of a merge or unmerge that was only planned."""

    plan: Mapping[str, int]
    """Numbers of tensors and shards, bytes of the output and of the undo record, and bytes of memory."""
    dry_run: bool = True

    @classmethod
    def of(cls, plan: Plan, settings: Settings, *, out: str, command: str = "merge") -> DryRunReport:
        """Return the report of a plan; raises UsageError if the memory budget is too small."""
        settings.check_memory(plan.memory)
        numbers = {
            "tensors": len(plan.items),
            "shards": len(plan.shards),
            "bytes_out": plan.bytes_out,
            "undo_bytes": plan.undo_bytes,
            "memory": min(settings.max_memory, settings.workers * plan.memory),
            "least_memory": plan.memory,
        }
        return cls(**(_common(plan, settings, out) | {"command": command}), plan=numbers)
