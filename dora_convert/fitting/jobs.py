"""Plan a new adapter from headers: which modules are fitted, from which tensors, at what cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ..adapters import Adapter, Change, Decomposed, LowRank, Transform, Update, low_rank
from ..errors import Fault, UnsupportedError, UsageError
from ..formats.detect import WritableFormat
from ..options import GoalOptions
from ..plan.item import Edit, Item
from ..plan.plan import Plan
from ..storage.checkpoint import Checkpoint
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor
from ..storage.stored_view import shown_rows, whole_of

HELD = {"lora": 10, "dora": 16}
"""Copies of a module's matrix that are held at once, in the dtype of the arithmetic."""


@dataclass(frozen=True)
class Job:
    """One module's part of a new adapter."""

    name: str
    """The weight's name in the adapter; unique among the jobs."""
    inputs: tuple[StoredTensor, ...]
    """The tensors of checkpoints that the job reads."""
    cost: int
    """Bytes held while the job runs."""

    @property
    def nbytes(self) -> int:
        """Bytes read, for the progress bar."""
        return sum(tensor.nbytes for tensor in self.inputs)

    @property
    def reads(self) -> tuple[Path, ...]:
        """The files that the job reads."""
        return tuple(path for tensor in self.inputs for path in tensor.paths)


@dataclass(frozen=True)
class Result:
    """A finished job: its tensors by role (A, B, m, …), and the numbers for the report."""

    tensors: Mapping[str, StoredTensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class FittingPlan:
    """An adapter to write: its jobs and the options that decide their results."""

    command: str
    words: tuple[str, ...]
    """The command line after the verb, with inputs by title, for the model card."""
    bases: tuple[Checkpoint, ...]
    jobs: Sequence[Job]
    format: WritableFormat
    bytes_out: int
    """Bytes of the output, at most."""
    terms: Mapping[str, Any] = field(default_factory=dict)
    """The other options that decide the result."""
    goal: Mapping[str, Any] = field(default_factory=dict)
    """The rank, the energy or the error of each module."""
    one_rank: bool = False
    """True if all modules get the largest rank that any of them needs."""
    is_dora: bool = False
    like: Adapter | None = None
    others: tuple[Adapter, ...] = ()
    """Further adapters that the new one is made of."""
    """The adapter that is converted, if there is one."""
    dtype: str | None = None
    carried: tuple[Path, ...] = ()
    """Files of checkpoints with tensors that are copied into the adapter."""

    @property
    def memory(self) -> int:
        """Bytes that the costliest job holds, which is the least budget."""
        return max((job.cost for job in self.jobs), default=0)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The inputs, in the order of the command line."""
        return (*(base.source for base in self.bases), *(each.source for each in self.adapters))

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters that are converted."""
        return (self.like, *self.others) if self.like else ()


@dataclass(frozen=True)
class MatchedChange(Job):
    """A change that has factors, and the tensors of the base that the change is for: mostly one."""

    change: Change
    parts: tuple[tuple[Item, Edit], ...]
    """Several if the running model's weight is stored in several tensors."""

    @property
    def item(self) -> Item:
        """The first tensor."""
        return self.parts[0][0]

    @property
    def edit(self) -> Edit:
        """The edit of the first tensor."""
        return self.parts[0][1]

    @property
    def is_cut(self) -> bool:
        """True if the weight of the running model is not one stored tensor."""
        return len(self.parts) > 1 or self.edit.outputs is not None or self._is_view(self.edit)

    def _is_view(self, edit: Edit) -> bool:
        low, own = edit.low, low_rank(self.change.update)
        return bool(low and own and not own.widest and (low.A, low.B) != (own.A, own.B))

    @property
    def matrix(self) -> tuple[int, int]:
        """The outputs and inputs of the running model's weight; of a weight that is one tensor, as it is stored."""
        low = low_rank(self.change.update)
        return (low.outputs, math.prod(low.inputs)) if low and self.is_cut else self.item.source.matrix

    def outputs(self, number: int) -> Sequence[int]:
        """Return the outputs of the running model's weight that one of the tensors holds, in the tensor's order."""
        low, own = self.parts[number][1].low, low_rank(self.change.update)
        assert low
        assert own
        rows = shown_rows(own.B)
        if (mine := shown_rows(low.B)) == rows:
            return range(len(rows))
        places = {row: place for place, row in enumerate(rows)}
        return [places[row] for row in mine]


def header(role: str, *shape: int) -> StoredTensor:
    """Return the header of a tensor that is not computed yet."""
    return StoredTensor(role, "F32", shape, Path("not computed yet"), 0)


def expected_factors(job: Job, matrix: tuple[int, int], low: LowRank | None, rank: int) -> dict[str, Result]:
    """Return the headers of a job's factors, of a rank: those of a convolution or of experts as `low` has them."""
    outputs, inputs = (low.outputs, low.inputs) if low else (matrix[0], matrix[1:])
    r, ones = rank * max(1, low.experts if low else 1), (1,) * (len(inputs) - 1)
    tensors = {"A": header("A", r, *inputs), "B": header("B", outputs, r, *ones)}
    return {job.name: Result(tensors, {"rank": rank})}


def needs_of(jobs: Collection[Job]) -> dict[str, tuple[Path, ...]]:
    """Return the files that each job reads, jobs of the same file together."""
    return {job.name: job.reads for job in sorted(jobs, key=lambda job: job.reads)}


def parse_goal(options: GoalOptions) -> dict[str, Any]:
    """Return the given one of rank, energy and max_error; UsageError for none or several."""
    every = {"rank": options["rank"], "energy": options["energy"], "max_error": options["max_error"]}
    goal = {name: value for name, value in every.items() if value is not None}
    if len(goal) != 1:
        raise UsageError(
            f"{'More than one' if goal else 'None'} of --rank, --energy and --max-error is given; "
            "exactly one is needed.",
            hint="such as --rank 32, --energy 0.99 or --max-error 0.01",
        )
    for name, value in goal.items():
        if name == "rank" and (not isinstance(value, Integral) or value < 1):
            raise UsageError(f"--rank {value}: a rank is a whole number, 1 or more.")
        if name != "rank" and (not isinstance(value, Real) or not 0 < value < 1):
            raise UsageError(f"--{name.replace('_', '-')} {value}: a share lies between 0 and 1.")
    return goal


def goal_words(goal: Mapping[str, Any], ranks: str) -> list[str]:
    """Return a goal as words of the command line."""
    words = [word for name, value in goal.items() for word in (f"--{name.replace('_', '-')}", f"{value:g}")]
    return words if ranks == "one" else [*words, "--ranks", ranks]


def doubt_ranks(facts: Collection[Mapping[str, Any]], others: Collection[LowRank] = ()) -> str | None:
    """Return a warning about fitted and other factors that differ in rank or scaling; None if they do not."""
    if len({*((fact["rank"], 1.0) for fact in facts), *((low.rank, low.scale) for low in others)}) < 2:
        return None
    return (
        "modules have different ranks or scalings: PEFT reads them right; "
        "llama.cpp and others that read one alpha for all modules compute other weights"
    )


def match_changes(
    plan: Plan, cost: Callable[[Item, Edit], int]
) -> tuple[list[MatchedChange], list[Change], list[Change]]:
    """Return an adapter's changes: matched ones of weights, unmatched ones of weights, and the rest.

    A change that --include or --exclude leaves out is in none of the three. Raises UnsupportedError for biases
    that are scaled as their weights, and for kinds without factors on parts of tensors.
    """
    found: dict[tuple[str, ...], list[tuple[Item, Edit]]] = {}
    for item in plan.items:
        for edit in item.edits:
            found.setdefault(_names(edit.update), []).append((item, edit))
    _refuse_followed(plan)
    matched, unmatched, others = [], [], []
    for change in plan.adapters[0].changes:
        if not plan.options.selects(change.module) or change.update.follows:
            continue
        low = low_rank(change.update)
        if not isinstance(change.update, Transform | Decomposed):
            others.append(change)
        elif parts := [part for part in found.get(_names(change.update), ()) if _is_of(part[1].update, change.update)]:
            if not low or all(edit.low and edit.low.B == low.B for _, edit in parts):
                parts = _alone(change, parts)  # one weight, or both sides of a former tie
            inputs = tuple(item.source for item, _ in parts)
            costs = [cost(item, edit) for item, edit in parts]
            matched.append(MatchedChange(change.target, inputs, sum(costs), change, tuple(parts)))
        else:
            unmatched.append(change)
    return matched, unmatched, others


def _names(update: Update) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in update.tensors)


def _is_of(update: Update, whole: Update) -> bool:
    """Return True if an edit's tensors lie within those of a change of the same names, of which a file has several."""
    pairs = [(whole_of(one), whole_of(other)) for one, other in zip(update.tensors, whole.tensors, strict=True)]
    return all(
        other.start <= one.start and one.start + one.nbytes <= other.start + other.nbytes for one, other in pairs
    )


def _alone(change: Change, parts: list[tuple[Item, Edit]]) -> list[tuple[Item, Edit]]:
    """Return the last of a change's parts, which are equal; UnsupportedError for parts that are not whole tensors."""
    if not low_rank(change.update) and any(edit.outputs for _, edit in parts):
        raise UnsupportedError(f"{change.target} is part of a stored tensor, and {change.update.title} has no factors.")
    return parts[-1:]


def _refuse_followed(plan: Plan) -> None:
    """Raise UnsupportedError for biases that an adapter scales: no LoRA does."""
    scaled = [item.name for item in plan.items if any(edit.follows for edit in item.edits)]
    if scaled:
        raise UnsupportedError(
            f"The adapter scales {len(scaled)} biases as it scales their weights, which no other kind of adapter does.",
            faults=[Fault(name, "is scaled") for name in scaled],
            hint="dora-convert merge makes a model of base and adapter",
        )


def modules_besides(plan: Plan, jobs: Collection[MatchedChange]) -> frozenset[str]:
    """Return the names of the base's modules that none of some jobs fits."""
    adapted = {item.name for job in jobs for item, _ in job.parts}
    return frozenset(name.rpartition(".")[0] for name in plan.base.tensors if name not in adapted)


def error_of(facts: Collection[Mapping[str, Any]], lost: str = "lost", change: str = "change") -> float:
    """Return the relative error of several modules, √(Σ lost / Σ change); 0 if nothing changes."""
    total = sum(fact[change] for fact in facts)
    return float((sum(fact[lost] for fact in facts) / total) ** 0.5) if total else 0.0


def compression_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a report says of a module that an SVD has compressed: its outputs' error, and ranks that suffice."""
    return {
        "output_error": error_of([facts], "output_lost", "output"),
        "rank_for_1_percent": facts["one_percent"],
        "rank_for_0.1_percent": facts["one_permille"],
        "ranks_computed": facts["known"],
    }
