"""What a verb returns, and what `--json` prints of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import Self

from .. import __version__
from ..errors import MalformedError
from ..plan.plan import Plan
from ..settings import Settings
from ..sizes import peak_memory
from .push import Pushed

if TYPE_CHECKING:  # these import torch, which a dry run does without
    from ..engine.precision import ComputeSpec
    from ..output.finished import Verdict

SCHEMA = 1
Finished = TypeVar("Finished", bound="MergeReport")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What every verb that merges reports, whether it ran or only planned."""

    command: str
    base: str
    adapters: tuple[str, ...]
    out: str
    tensors: Mapping[str, int]
    ledger: tuple[Mapping[str, Any], ...]
    undo: str
    warnings: tuple[str, ...]
    left_behind: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        return {"schema": SCHEMA, "version": __version__, **asdict(self)}


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
    """The self-check: elements compared, how many lie outside the bound, and the largest distance in ulps."""

    checked: int
    wrong_elements: int
    max_ulp: int


@dataclass(frozen=True, kw_only=True)
class MergeReport(Report):
    """What a merge did."""

    device: str
    compute_dtype: str
    bytes_written: int
    peak_memory_bytes: int | None
    resumed: bool
    verified: Verified | None
    lost: float | None
    pushed: Pushed | None = None
    outputs: Mapping[str, Any] | None = None
    """What running the merged model found, as `verify --level outputs` reports it; None where it was not run."""

    @classmethod
    def of(
        cls,
        plan: Plan,
        settings: Settings,
        out: str,
        spec: ComputeSpec,
        verdict: Verdict | None,
        *,
        written: int,
        resumed: bool,
        pushed: Pushed | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> MergeReport:
        """The report of a finished merge; `lost` is the share of the change that rounding took, on the sample."""
        found = None
        if verdict:
            found = Verified(checked=verdict.checked, wrong_elements=verdict.wrong, max_ulp=verdict.max_ulp)
        return cls(
            **_common(plan, settings, out),
            device=str(spec.device),
            compute_dtype=spec.compute_name,
            bytes_written=written,
            peak_memory_bytes=peak_memory(),
            resumed=resumed,
            verified=found,
            lost=verdict.lost if verdict else None,
            pushed=pushed,
            outputs=outputs,
        )

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """A report from what `to_dict` made of it."""
        try:
            fields = {name: values[name] for name in cls.__dataclass_fields__}
            fields["verified"] = values["verified"] and Verified(**values["verified"])
            if "modules" in fields:
                fields["modules"] = tuple(Recovered(**module) for module in values["modules"])
        except (KeyError, TypeError) as error:
            raise MalformedError(
                f"The journal of the finished run has no whole report: {error!r}."
            ) from error
        return cls(**fields | {"resumed": True})


@dataclass(frozen=True)
class Recovered:
    """One tensor that a merge had changed, as it came back."""

    name: str
    bit_exact: bool
    """Whether its hash proves that it is the base's."""
    lost: int
    """Elements for which the base may have held one of several values: all of them were merged to the same."""
    elements: int


@dataclass(frozen=True, kw_only=True)
class UnmergeReport(MergeReport):
    """What an unmerging did; `exact` counts the tensors that the merge had changed, and those proven by hash."""

    merged: str
    exact: Mapping[str, int]
    modules: tuple[Recovered, ...]

    @classmethod
    def undone(
        cls,
        plan: Plan,
        settings: Settings,
        out: str,
        spec: ComputeSpec,
        verdict: Verdict | None,
        modules: Sequence[Recovered],
        *,
        base: str,
        undo: str,
        written: int,
        resumed: bool,
    ) -> UnmergeReport:
        """The report of a finished unmerging."""
        merge = MergeReport.of(plan, settings, out, spec, verdict, written=written, resumed=resumed)
        fields = {name: getattr(merge, name) for name in merge.__dataclass_fields__}
        fields |= {"command": "unmerge", "base": base, "merged": merge.base, "undo": undo}
        exact = sum(module.bit_exact for module in modules)
        return cls(**fields, exact={"tensors": len(modules), "bit_exact": exact}, modules=tuple(modules))


@dataclass(frozen=True, kw_only=True)
class DryRunReport(Report):
    """What a merge would do: tensors and shards, their bytes, the undo record's, and the memory held."""

    plan: Mapping[str, int]
    dry_run: bool = True

    @classmethod
    def of(cls, plan: Plan, settings: Settings, out: str, command: str = "merge") -> DryRunReport:
        """The report of a plan; UsageError for a budget that would not do."""
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


@dataclass(frozen=True, kw_only=True)
class PushReport(Pushed):
    """What was pushed, or would be: the `state` of a file is uploaded, copied, unchanged, or planned."""

    kind: str  # checkpoint | adapter
    left_behind: tuple[str, ...]
    dry_run: bool
    seconds: float
    command: str = "push"

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        return {"schema": SCHEMA, "version": __version__, **asdict(self)}
