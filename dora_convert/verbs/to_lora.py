"""to-lora: make a plain LoRA of any adapter, or a LoRA of another rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from ..adapters import Change, Decomposed, Delta, LowRank, low_rank, transform_of
from ..adapters.new_adapter import NewAdapter
from ..fitting.jobs import (
    HELD,
    FittingPlan,
    MatchedChange,
    Result,
    compression_of,
    doubt_ranks,
    error_of,
    expected_factors,
    goal_words,
    match_changes,
    modules_besides,
    parse_goal,
)
from ..fitting.session import Fitter, FittingSession
from ..naming.resolve import is_embedding, is_head
from ..options import ToLoraOptions
from ..plan.item import Edit, Item
from ..plan.plan import Plan
from ..reports.fitting import MadeDryRun, MadeReport
from ..storage.refs import PathLike
from . import takes

if TYPE_CHECKING:
    from ..fitting.run import FitJob

LOSSY = 0.05
"""The relative error above which merging is the better way out."""
COMPARED = 1 << 21
"""Elements of ΔW that are compared with the product of the factors at once, in float64."""


@takes(ToLoraOptions)
def to_lora(
    base: PathLike | None, adapter: PathLike | Sequence[PathLike], out: PathLike, **options: Unpack[ToLoraOptions]
) -> MadeReport | MadeDryRun:
    """Make a plain LoRA of an adapter: for each module the best factors of ΔW = apply(W) − W.

    Several adapters become one LoRA of what they do together, combined as `merge` combines them.

    Exactly one of `rank`, `energy` (the share of squared singular values that is kept) and `max_error`
    (relative, of each module's ΔW) says how good. All modules get the largest rank that any of them needs, or
    with `ranks` "per-module" each the least that it needs.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    goal = parse_goal(options)
    with FittingSession.begin(out, options) as session:
        matched = session.match(base, adapter, "to-lora")
        if len(matched.adapters) > 1 or any(item.combination for item in matched.items) or matched.weights != (1.0,):
            from ..fitting.several import SeveralToLora

            return session.finish(SeveralToLora(session, matched, options, goal), kept=[])
        changes = _divide(matched, session)
        fitter = _ToLora(session, matched, changes, options, goal)
        return session.finish(fitter, kept=[job.name for job in changes.kept])


@dataclass(frozen=True)
class _AdapterChanges:
    """The changes of an adapter: with new factors, with their own, and without factors."""

    jobs: list[MatchedChange]
    kept: list[MatchedChange]
    unmatched: list[Change]
    others: list[Change]

    @property
    def biases(self) -> dict[str, Delta]:
        """The biases on lora_B of modules that get new factors."""
        modules = {job.name.rpartition(".")[0] for job in self.jobs}
        updates = {change.target.rpartition(".")[0]: change.update for change in self.others}
        return {name: update for name, update in updates.items() if isinstance(update, Delta) and name in modules}


def _divide(matched: Plan, session: FittingSession) -> _AdapterChanges:
    """Return the changes by their fate."""
    rank = max((edit.low.rank for item in matched.items for edit in item.edits if edit.low), default=0)
    jobs, unmatched, others = match_changes(matched, partial(_cost, matched, session, rank))
    kept = [
        job
        for job in jobs
        if session.format.writer().shares_rank(job.change, job.item.name, matched.adapters[0])
        or (unmatched and (is_embedding(job.name) or is_head(job.name)))
    ]
    return _AdapterChanges([job for job in jobs if job not in kept], kept, unmatched, others)


def _cost(matched: Plan, session: FittingSession, rank: int, item: Item, edit: Edit) -> int:
    """Return the bytes that a job holds: blocks, factors, and, except for a plain LoRA, matrices.

    `rank` is the largest of the adapter's, which all modules may get.
    """
    plain = edit.low and not edit.decomposed and not item.start
    factors = 8 * 4 * rank * sum(item.source.matrix)
    matrix = 24 * min(item.source.numel, COMPARED)
    if not plain:
        matrix = max(matrix, HELD["lora"] * (4 if session.single else 8) * item.source.numel)
    return item.cost(matched.options.width) + matrix + factors


def _largest_rank(job: MatchedChange, goal: Mapping[str, Any]) -> int:
    """Return the largest rank that a module's new factors can have."""
    exact = min(job.matrix)
    if isinstance(low := job.change.update, LowRank) and not low.start:
        exact = min(exact, low.rank)
    return min(exact, goal.get("rank") or exact)


def _transposed(job: MatchedChange) -> bool | None:
    """Return True for factors of an embedding, False for a convolution's, None for others."""
    inner = transform_of(job.change.update)
    return inner.transposed if inner else None


@dataclass(frozen=True)
class _ToLora(Fitter):
    """Fits factors to the changes of an adapter."""

    session: FittingSession
    matched: Plan
    changes: _AdapterChanges
    options: ToLoraOptions
    goal: Mapping[str, Any]

    def plan(self) -> FittingPlan:
        """Return the modules that get new factors."""
        adapter, base = self.matched.adapters[0], self.matched.base
        jobs, one_rank = self.changes.jobs, self.options["ranks"] == "one"
        ranks = [_largest_rank(job, self.goal) for job in jobs]
        ranks = [max(ranks)] * len(jobs) if one_rank and jobs else ranks
        size = sum(tensor.nbytes for tensor in adapter.tensors.values())
        size += sum(4 * rank * sum(job.matrix) for rank, job in zip(ranks, jobs, strict=True))
        terms = {"plan": self.matched.fingerprint}
        return FittingPlan(
            command="to-lora",
            words=(base.source.title, adapter.source.title, "OUT", *goal_words(self.goal, self.options["ranks"])),
            bases=(base,),
            jobs=jobs,
            format=self.session.format,
            bytes_out=size,
            terms={**terms, "exact": self.options["exact_svd"], "single": self.session.single},
            goal=self.goal,
            one_rank=one_rank,
            like=adapter,
            dtype=self.session.selection.dtype,
        )

    def load(self) -> FitJob:
        """Return the truncated SVD of one module's ΔW."""
        from ..fitting.compress import compress

        return partial(
            compress,
            goal=self.goal,
            exact=self.options["exact_svd"],
            single=self.session.single,
            dtype=self.session.selection.dtype,
            biases=self.changes.biases,
        )

    def expected(self) -> dict[str, Result]:
        """Return the headers of the new factors, of the largest ranks."""
        found: dict[str, Result] = {}
        for job in self.changes.jobs:
            low, rank = low_rank(job.change.update), _largest_rank(job, self.goal)
            found |= expected_factors(job, job.matrix, low, rank)
        return found

    def assemble(self, results: Mapping[str, Result]) -> dict[str, NewAdapter]:
        """Return the LoRA: new factors with scaling 1, and everything else as it was."""
        adapter, divided = self.matched.adapters[0], self.changes
        changes, biases = [], {}
        for job in divided.jobs:
            tensors = results[job.name].tensors
            low = LowRank(tensors["A"], tensors["B"], 1.0, transposed=_transposed(job))
            changes.append(replace(job.change, update=low))
            biases[job.name.rpartition(".")[0]] = tensors.get("b")
        for change in [*(job.change for job in divided.kept), *divided.unmatched, *divided.others]:
            b = biases.get(change.target.rpartition(".")[0]) if isinstance(change.update, Delta) else None
            changes.append(replace(change, update=Delta(b, 1.0)) if b else change)
        before = sum(isinstance(change.update, LowRank | Decomposed) for change in adapter.changes)
        after = sum(isinstance(change.update, LowRank) for change in changes)
        pruned = any(name.endswith(".lora_E") for name in adapter.ignored)
        same = before == after and not pruned and all(low_rank(job.change.update) for job in divided.jobs)
        lora = NewAdapter(
            tuple(changes),
            adapter,
            self.session.settings.base_model,
            targets=None if same else (),
            besides=modules_besides(self.matched, [*divided.jobs, *divided.kept]),
            model=self.matched.base,
        )
        return {"": lora}

    def describe(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the error of a module's outputs, and the ranks that smaller errors would need."""
        return compression_of(facts)

    def conclude(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Return the error of all outputs together; warn if merging is the better way out."""
        warn = self.session.settings.warn
        facts = [result.facts for result in results.values()]
        error = error_of(facts)
        factors = sum(results[job.name].facts["rank"] * sum(job.matrix) for job in self.changes.jobs)
        dense = sum(math.prod(job.matrix) for job in self.changes.jobs)
        better = error > LOSSY or factors > dense / 2
        if better:
            lost = f"{error:.0%} of the change is lost"
            why = lost if error > LOSSY else "its factors are as large as the weights"
            warn(f"merging would be the better way out: {why}")
        for job in self.changes.kept:
            if job.edit.low and (rank := job.edit.low.rank) > self.goal.get("rank", rank):
                warn(f"{job.name} stays at rank {rank}: PEFT has one rank for several weights")
        others = [job.change.update for job in self.changes.kept]
        others += [change.update for change in self.changes.unmatched]
        if doubt := doubt_ranks(facts, [low for each in others if (low := low_rank(each))]):
            warn(doubt)
        return {"output_error": error_of(facts, "output_lost", "output"), "merging_is_better": better}
