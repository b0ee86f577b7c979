"""Hold the reports of merge, of unmerge and of their dry runs, and put them into words."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from ..errors import MalformedError
from ..settings import Settings, format_size, peak_memory
from . import Report, Table, cut, rest, table

if TYPE_CHECKING:
    from ..engine.run import Run
    from ..output.finished import Verdict
    from ..plan.plan import Plan
    from .push import Pushed


@dataclass(frozen=True, kw_only=True)
class PlanReport(Report):
    """The fields that a run of a plan and its dry run share."""

    base: str
    adapters: tuple[str, ...]
    out: str
    tensors: Mapping[str, int]
    """Output tensors by fate."""
    ledger: tuple[Mapping[str, Any], ...]
    """The fate of every adapter tensor."""
    method: str
    """The way in which several adapters are combined."""
    weights: tuple[float, ...]
    """The strength of each adapter."""
    density: tuple[float, ...]
    """The share of each adapter's change that is kept; empty if the method keeps all."""
    seed: int
    majority_sign: str
    undo: str
    warnings: tuple[str, ...]
    left_behind: tuple[str, ...]
    """Files of the base that are not copied."""

    def parts(self, *, every: bool) -> Iterator[Table | str]:
        """Yield the ledger and a summary; `every` lists each weight."""
        yield ledger_table(self.ledger, every=every)
        yield from summary(self)


def _common(plan: Plan, settings: Settings, out: str) -> dict[str, Any]:
    how = plan.options.combination
    return {
        "method": how.method,
        "weights": tuple(plan.weights),
        "density": how.densities,
        "seed": how.seed,
        "majority_sign": how.majority_sign,
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
    def of(cls, plan: Plan, settings: Settings, run: Run, *, out: str, verdict: Verdict | None, **fields: Any) -> Self:
        """Return the report of a finished run of a plan; `fields` are the other fields, or replace some."""
        verified = None
        if verdict:
            verified = Verified(checked=verdict.checked, wrong_elements=verdict.wrong, max_ulp=verdict.max_ulp)
        computed = {
            "device": run.spec.title,
            "compute_dtype": run.spec.compute_name,
            "bytes_written": run.written,
            "peak_memory_bytes": peak_memory(),
            "resumed": run.resumed,
            "verified": verified,
            "lost": verdict.lost if verdict else None,
        }
        return cls(**_common(plan, settings, out) | computed | fields)

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

    def parts(self, *, every: bool) -> Iterator[Table | str]:
        """Yield the ledger, the tensors that are not proven, and a summary."""
        yield ledger_table(self.ledger, every=every)
        if unproven := [module for module in self.modules if not module.bit_exact]:
            worst = sorted(unproven, key=lambda module: module.lost / max(1, module.elements), reverse=True)
            yield _lost_table(cut(worst, every=every))
            yield from rest(worst, "tensors", every=every)
        *lines, out = summary(self)
        yield from lines
        if self.modules:
            yield _proven(self.modules)
        yield out


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


def ledger_table(ledger: Iterable[Mapping[str, Any]], *, every: bool) -> Table:
    """Return the ledger by kind of weight, layers counted together; `every` lists each weight."""
    groups: dict[tuple[str, str], set[str]] = {}
    for name, fate, why in dict.fromkeys((_changed(entry), entry["fate"], entry["why"]) for entry in ledger):
        groups.setdefault((name if every else fold_name(name), f"{fate}: {why}"), set()).add(name)
    rows = [(kind, len(names), fate) for (kind, fate), names in groups.items()]
    return table(("module", ">n", "fate"), rows)


def _changed(entry: Mapping[str, Any]) -> str:
    """Return the weight that an adapter tensor is part of, or else the adapter tensor."""
    return str(entry["into"][0].removesuffix(".weight") if entry["into"] else entry["tensor"])


def fold_name(name: str) -> str:
    """Return a tensor's name without its layer numbers and PEFT's prefix."""
    return re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model."))


def summary(report: PlanReport) -> Iterator[str]:
    """Yield the results of a merge, or of its plan, in a few lines."""
    counts, values = report.tensors, replace(report, ledger=()).to_dict()
    added = f"{counts['added']} added, " if counts["added"] else ""
    tensors = (
        f"{counts['total']} tensors: {counts['merged']} merged, {counts['replaced']} replaced, {added}"
        f"{counts['copied']} copied"
    )
    fates = Counter(entry["fate"] for entry in report.ledger)
    yield f"{len(report.ledger)} adapter tensors: " + ", ".join(f"{n} {fate}" for fate, n in fates.items())
    if "plan" in values:
        yield f"{tensors}; nothing was written"
        yield _planned(values["plan"])
    else:
        yield f"{tensors}; {written(values)}"
        yield from _checks(values)
    yield f"out: {report.out}"


def written(values: Mapping[str, Any]) -> str:
    """Return the size, time and peak memory of a run."""
    peak = values["peak_memory_bytes"]
    memory = f"peak memory {format_size(peak)}" if peak else "peak memory unknown"
    return f"{format_size(values['bytes_written'])} in {values['seconds']:.1f} s, {memory}"


def _planned(plan: Mapping[str, int]) -> str:
    return (
        f"would write {format_size(plan['bytes_out'])} in {plan['shards']} files and an undo record of "
        f"at most {format_size(plan['undo_bytes'])}, holding {format_size(plan['memory'])} in memory"
    )


def _checks(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the results of the self-check, the upload, and the comparison of outputs."""
    if checked := values["verified"]:
        lost = "" if values["lost"] is None else f"; rounding took {values['lost']:.2%} of the change"
        yield (
            f"checked: {checked['wrong_elements']} of {checked['checked']:,} elements wrong, "
            f"at most {checked['max_ulp']} ulp from the exact result{lost}"
        )
    if pushed := values["pushed"]:
        yield f"pushed: {pushed['url']}, {format_size(pushed['bytes_uploaded'])}"
    if outputs := values["outputs"]:
        yield (
            f"outputs: {outputs['verdict']}, {outputs['max_abs_logit_error']:.2g} apart at most; "
            f"rounding alone leaves {outputs['rounding_floor']:.2g}"
        )


def _lost_table(modules: Sequence[Recovered]) -> Table:
    rows = [(module.name, f"{module.lost:,}", f"{module.lost / max(1, module.elements):.2%}") for module in modules]
    return table(("not proven to be the base's", ">elements lost to rounding", ">share"), rows)


def _proven(modules: Sequence[Recovered]) -> str:
    exact, lost = sum(module.bit_exact for module in modules), sum(module.lost for module in modules)
    text = f"{exact} of {len(modules)} recovered tensors are the base's, bit for bit, by their hashes"
    return f"{text}; rounding took {lost:,} elements" if lost else text
