"""to-lora: a plain LoRA of any adapter, or a LoRA of another rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..adapters.adapter import Change
from ..adapters.new_adapter import NewAdapter
from ..adapters.updates import Decomposed, Delta, LowRank, low_rank
from ..fitting.jobs import HELD, FittingPlan, MatchedChange, Result, goal_of, modules_besides, place_changes
from ..fitting.report import share
from ..fitting.session import FittingSession
from ..hub.target import PushTarget
from ..naming.ties import is_embedding, is_head
from ..plan.item import Edit, Item
from ..plan.plan import Plan
from ..reports.fitting import FittedModule, MadeDryRun, MadeReport
from ..storage.refs import PathLike

LOSSY = 0.05
"""A relative error above which merging is the better way out."""
COMPARED = 1 << 21
"""Elements of ΔW that are compared at once with what the factors make of them, in float64."""


def to_lora(
    base: PathLike | None,
    adapter: PathLike,
    out: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    exact_svd: bool = False,
    format: str = "peft",  # noqa: A002 - the option's name
    device: str = "auto",
    dtype: str = "auto",
    compute_dtype: str = "auto",
    max_memory: str | int = "auto",
    workers: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    ignore_field: Sequence[str] = (),
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    cache: bool = True,
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> MadeReport | MadeDryRun:
    """Make a plain LoRA of an adapter: for each module the best factors of ΔW = apply(W) − W.

    Exactly one of `rank`, `energy` (the share of squared singular values that is kept) and `max_error` (relative, of
    each module's ΔW) says how good. A rank above what a module needs is lowered for it.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    goal = goal_of(rank, energy, max_error)
    with FittingSession.begin(
        out, format=format, device=device, dtype=dtype, compute_dtype=compute_dtype, max_memory=max_memory, workers=workers,
        include=include, exclude=exclude, ignore_field=ignore_field, base_model=base_model, cache=cache, token=token, overwrite=overwrite,
        push=PushTarget.parse(push_to_hub=push_to_hub, private=private, create_pr=create_pr, commit_message=commit_message, token=token), on_progress=on_progress, on_notice=on_notice,
    ) as making:  # fmt: skip
        plan = making.plan(*making.open(base, adapter, "to-lora"))
        found = _sorted(plan, making, single=compute_dtype != "float64")
        order = _order(plan, making, found, goal, exact=exact_svd)
        return making.finish(
            order, partial(_work, goal, making, found, exact=exact_svd), partial(_assemble, found, plan, base_model),
            _module, dry_run=dry_run, kept=[job.name for job in found.kept], conclude=partial(_conclude, found, making, goal),
        )  # fmt: skip


@dataclass(frozen=True)
class _Sorted:
    """The changes of an adapter: what gets new factors, what must keep its own, and what has none."""

    made: list[MatchedChange]
    kept: list[MatchedChange]
    copies: list[Change]
    others: list[Change]
    single: bool

    @property
    def shifts(self) -> dict[str, Delta]:
        """The biases on lora_B of modules that get new factors."""
        modules = {job.name.rpartition(".")[0] for job in self.made}
        found = {change.target.rpartition(".")[0]: change.update for change in self.others}
        return {
            name: update for name, update in found.items() if isinstance(update, Delta) and name in modules
        }


def _sorted(plan: Plan, making: FittingSession, *, single: bool) -> _Sorted:
    def cost(item: Item, edit: Edit) -> int:
        """Bytes: blocks and factors, and, unless it is a plain LoRA, the matrix some times over."""
        plain = not edit.decomposed and not item.start
        factors = 8 * 4 * (edit.low.rank if edit.low else 0) * sum(item.source.matrix)
        compared = 24 * min(item.source.numel, COMPARED)
        matrix = compared if plain else max(compared, HELD["lora"] * (4 if single else 8) * item.source.numel)
        return item.cost(plan.options.width) + matrix + factors

    placed, copies, others = place_changes(plan, cost)
    kept = [
        job
        for job in placed
        if making.saves.shares_rank(job.change, job.item.name, plan.adapters[0])
        or (copies and (is_embedding(job.name) or is_head(job.name)))
    ]
    return _Sorted([job for job in placed if job not in kept], kept, copies, others, single)


def _most(job: MatchedChange, goal: Mapping[str, Any]) -> int:
    """The largest rank that a module can come out at."""
    rows, columns = job.item.source.matrix
    exact = min(rows, columns)
    if isinstance(low := job.change.update, LowRank) and not low.start:
        exact = min(exact, low.rank)
    return min(exact, goal.get("rank") or exact)


def _order(
    plan: Plan, making: FittingSession, found: _Sorted, goal: Mapping[str, Any], *, exact: bool
) -> FittingPlan:
    adapter = plan.adapters[0]
    carried = sum(tensor.nbytes for tensor in adapter.tensors.values())
    factors = sum(4 * _most(job, goal) * sum(job.item.source.matrix) for job in found.made)
    words = [f"--{name.replace('_', '-')} {value:g}" for name, value in goal.items()]
    return FittingPlan(
        command="to-lora",
        words=(plan.base.source.title, adapter.source.title, "OUT", *" ".join(words).split()),
        bases=(plan.base,),
        jobs=found.made,
        format=making.saves,
        bytes_out=carried + factors,
        terms={"plan": plan.fingerprint, "goal": goal, "exact": exact, "single": found.single},
        like=adapter,
        dtype=making.options.dtype,
    )


def _work(
    goal: Mapping[str, Any], making: FittingSession, found: _Sorted, *, exact: bool
) -> Callable[[MatchedChange, Any], Any]:
    from ..fitting.compress import compress

    return partial(
        compress, goal=goal, exact=exact, single=found.single, dtype=making.options.dtype, shifts=found.shifts
    )


def _assemble(
    found: _Sorted, plan: Plan, base_model: str | None, results: Mapping[str, Result]
) -> dict[str, NewAdapter]:
    """The LoRA: new factors with scaling 1, and everything else as it was."""
    adapter = plan.adapters[0]
    changes = []
    for job in found.made:
        tensors = results[job.name].tensors
        low = LowRank(tensors["A"], tensors["B"], 1.0, transposed=low_rank_of(job).transposed)
        changes.append(replace(job.change, update=low))
    shifted = {job.name.rpartition(".")[0]: results[job.name].tensors.get("b") for job in found.made}
    for change in [*(job.change for job in found.kept), *found.copies, *found.others]:
        b = shifted.get(change.target.rpartition(".")[0]) if isinstance(change.update, Delta) else None
        changes.append(replace(change, update=Delta(b, 1.0)) if b else change)
    before = sum(isinstance(change.update, LowRank | Decomposed) for change in adapter.changes)
    after = sum(isinstance(change.update, LowRank) for change in changes)
    pruned = any(name.endswith(".lora_E") for name in adapter.ignored)
    targets = None if before == after and not pruned else ()
    besides = modules_besides(plan, [*found.made, *found.kept])
    return {"": NewAdapter(tuple(changes), adapter, base_model, targets=targets, besides=besides)}


def low_rank_of(job: MatchedChange) -> LowRank:
    """The factors that a job's adapter has for it."""
    assert isinstance(job.change.update, LowRank | Decomposed)
    return low_rank(job.change.update)


def _module(name: str, result: Result) -> FittedModule:
    facts = result.facts
    details = {
        "output_error": share(facts["output_lost"], facts["output"]),
        "rank_for_1_percent": facts["one_percent"],
        "rank_for_0.1_percent": facts["one_permille"],
        "ranks_computed": facts["known"],
    }
    error = share(facts["lost"], facts["change"])
    return FittedModule(name=name, rank=facts["rank"], relative_error=error, details=details)


def _conclude(
    found: _Sorted, making: FittingSession, goal: Mapping[str, Any], results: Mapping[str, Result]
) -> dict[str, Any]:
    """Errors of all outputs together, and whether merging would be the better way out."""
    facts = [result.facts for result in results.values()]
    error = share(sum(fact["lost"] for fact in facts), sum(fact["change"] for fact in facts))
    factors = sum(results[job.name].facts["rank"] * sum(job.item.source.matrix) for job in found.made)
    dense = sum(math.prod(job.item.source.matrix) for job in found.made)
    better = error > LOSSY or factors > dense / 2
    if better:
        why = (
            f"{error:.0%} of the change is lost"
            if error > LOSSY
            else "its factors are as large as the weights"
        )
        making.settings.warn(f"merging would be the better way out: {why}")
    for job in found.kept:
        if "rank" in goal and low_rank_of(job).rank > goal["rank"]:
            making.settings.warn(
                f"{job.name} stays at rank {low_rank_of(job).rank}: PEFT has one rank for several weights"
            )
    output = share(sum(fact["output_lost"] for fact in facts), sum(fact["output"] for fact in facts))
    return {"output_error": output, "merging_is_better": better}
