"""What a verb that writes an adapter has decided from headers: which modules are computed, at what cost, from what."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

from ..adapters.adapter import Adapter, Change
from ..adapters.new_adapter import NewAdapter
from ..adapters.updates import Decomposed, LowRank, low_rank
from ..errors import UsageError
from ..formats.detect import Format
from ..plan.item import Edit, Item
from ..plan.plan import Plan
from ..storage.checkpoint import Checkpoint
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor

HELD = {"lora": 10, "dora": 16}
"""How often a module's matrix is held at once, in the dtype it is computed in."""


class Job(Protocol):
    """One module's part of a new adapter."""

    @property
    def name(self) -> str:
        """What the adapter calls it; no two jobs share one."""

    @property
    def cost(self) -> int:
        """Bytes held while it is made."""

    @property
    def nbytes(self) -> int:
        """Bytes read, for the progress bar."""

    @property
    def reads(self) -> tuple[Path, ...]:
        """The files of checkpoints that it reads."""


@dataclass(frozen=True)
class Result:
    """What became of a job: its tensors by what they are (A, B, m, …), and what the report says of it."""

    tensors: Mapping[str, StoredTensor]
    facts: Mapping[str, Any]


Assemble = Callable[[Mapping[str, Result]], Mapping[str, NewAdapter]]
"""Makes the adapters of the results: each under the sub-folder it goes to, "" being OUT itself."""


@dataclass(frozen=True)
class FittingPlan:
    """An adapter to be written."""

    command: str
    words: tuple[str, ...]
    """The rest of the command line that makes it again, inputs by title."""
    bases: tuple[Checkpoint, ...]
    jobs: Sequence[Job]
    format: Format
    bytes_out: int
    """The most that the output can take."""
    terms: Mapping[str, Any] = field(default_factory=dict)
    """The options that decide the result."""
    makes_dora: bool = False
    like: Adapter | None = None
    dtype: str | None = None
    carried: tuple[Path, ...] = ()
    """Files of checkpoints that hold tensors which go into the adapter as they are."""

    @property
    def memory(self) -> int:
        """Bytes that the costliest job holds: the least that a budget can be."""
        return max((job.cost for job in self.jobs), default=0)

    @property
    def needs(self) -> dict[str, tuple[Path, ...]]:
        """The files that each job reads, file by file, so that few are needed long; "" is the writing at the end."""
        reads = {job.name: job.reads for job in sorted(self.jobs, key=lambda job: job.reads)}
        return {**reads, "": self.carried}

    @property
    def sources(self) -> tuple[Source, ...]:
        """Base and other inputs, in the order of the command line."""
        others = (self.like.source,) if self.like else ()
        return (*(base.source for base in self.bases), *others)


@dataclass(frozen=True)
class MatchedChange:
    """A change that has factors, and the tensor of the base that it is for."""

    change: Change
    item: Item
    edit: Edit
    cost: int

    @property
    def name(self) -> str:
        """The weight, as the adapter calls it."""
        return self.change.target

    @property
    def nbytes(self) -> int:
        """What is read of the base."""
        return self.item.source.nbytes

    @property
    def reads(self) -> tuple[Path, ...]:
        """The base's file that it is in."""
        return (self.item.source.path,)


def goal_of(rank: int | None, energy: float | None, max_error: float | None) -> dict[str, Any]:
    """The one of the three that is given, under its name; UsageError for none, several, or what nothing can have."""
    goals = {"rank": rank, "energy": energy, "max_error": max_error}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        count = "None" if not given else "More than one"
        raise UsageError(
            f"{count} of --rank, --energy and --max-error is given; exactly one is needed.",
            hint="such as --rank 32, --energy 0.99 or --max-error 0.01",
        )
    if rank is not None and (not isinstance(rank, Integral) or rank < 1):
        raise UsageError(f"--rank {rank}: a rank is a whole number, 1 or more.")
    for name, value in (("energy", energy), ("max-error", max_error)):
        if value is not None and (not isinstance(value, Real) or not 0 < value < 1):
            raise UsageError(f"--{name} {value}: a share lies between 0 and 1.")
    return given


def place_changes(
    plan: Plan, cost: Callable[[Item, Edit], int]
) -> tuple[list[MatchedChange], list[Change], list[Change]]:
    """The changes of a plan's only adapter: those that have factors and a place, others with factors, and the rest.

    What was left out by name is in none of them.
    """
    places = {edit.low.A.name: (item, edit) for item in plan.items for edit in item.edits if edit.low}
    placed, unplaced, others = [], [], []
    for change in plan.adapters[0].changes:
        if not plan.options.selects(change.module):
            continue
        if not isinstance(change.update, LowRank | Decomposed):
            others.append(change)
        elif found := places.get(low_rank(change.update).A.name):
            placed.append(MatchedChange(change, *found, cost(*found)))
        else:
            unplaced.append(change)
    return placed, unplaced, others


def modules_besides(plan: Plan, placed: Collection[MatchedChange]) -> frozenset[str]:
    """The modules of a plan's base for which none of some factors are, by their names in the base."""
    adapted = {job.item.name for job in placed}
    return frozenset(name.rpartition(".")[0] for name in plan.base.tensors if name not in adapted)
