"""Hold what a run has to do and has done: its tasks, results by tensor, and the lines of its journal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from ..errors import Fault, VerificationError
from ..plan.item import Item
from ..plan.plan import OutputShard, Plan
from ..records import record
from ..storage.json_files import Count, Real
from ..storage.safetensors import StoredTensor
from ..storage.spool import SpooledTensor
from .shards import Copy


class Task(NamedTuple):
    """A piece of work as data, which any worker can do: in this process, in another, or on another machine."""

    kind: Literal["copy", "write", "keep", "hash"]
    """Copy bytes, write tensors of the plan, keep tensors of the base in the undo record, or hash copied tensors."""
    shard: str
    names: tuple[str, ...] = ()
    """The tensors, by their names in the plan."""
    copy: Copy | None = None


@record(frozen=True)
class Verdict:
    """The result of a check; the counts of several checks add up."""

    checked: int = 0
    """Elements compared."""
    wrong: int = 0
    """Elements outside the bound."""
    max_ulp: int = 0
    """Largest distance from the rounded float64 result, in units in the last place of the stored dtype."""
    rounding: Real = 0.0
    """Σ (rounded − x)², the loss of rounding to the stored dtype."""
    change: Real = 0.0
    """Σ (x − W)², the change by the adapter."""

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(
            self.checked + other.checked,
            self.wrong + other.wrong,
            max(self.max_ulp, other.max_ulp),
            self.rounding + other.rounding,
            self.change + other.change,
        )

    @property
    def lost(self) -> float | None:
        """Share of the change's norm lost to rounding; None without a change."""
        return math.sqrt(self.rounding / self.change) if self.change else None

    def rows(self) -> list[tuple[str, str]]:
        """Return the rows of a model card's table of checks."""
        rows = [
            ("elements compared", f"{self.checked:,}"),
            ("wrong", f"{self.wrong:,}"),
            ("largest distance from the rounded result", f"{self.max_ulp} ulp"),
        ]
        return rows if self.lost is None else [*rows, ("share of the change lost to rounding", f"{self.lost:.2%}")]


@record(frozen=True)
class TensorResult:
    """The facts about a written tensor: hashes of both tensors, parts of the undo record, the self-check."""

    base_hash: str | None
    """xxh3-128 of the bytes that were read: the base's in a merge, the merged ones in an unmerge."""
    written_hash: str
    """xxh3-128."""
    proof: str | None
    """sha256 of the base's bytes, read or recovered, if asked for."""
    parts: tuple[SpooledTensor, ...] = ()
    verdict: Verdict | None = None
    ambiguous: Count = 0
    """Elements of a recovered tensor that several values of the base would have given."""
    cuts: tuple[tuple[Real, int], ...] = ()
    """For each pruned change, the least magnitude kept, and the flat place of the last kept one that equals it."""

    def judged(self, verdict: Verdict | None) -> TensorResult:
        """Return the same facts with a verdict; `dataclasses.replace` takes ten times as long."""
        return TensorResult(
            self.base_hash,
            self.written_hash,
            self.proof,
            parts=self.parts,
            verdict=verdict,
            ambiguous=self.ambiguous,
            cuts=self.cuts,
        )


class Checker(Protocol):
    """Compares written tensors with their definitions."""

    def read_headers(self, shards: Iterable[OutputShard]) -> None:
        """Read the headers of shards back; VerificationError for other tensors than the plan's."""

    def check_all(self, finished: Sequence[tuple[Item, TensorResult]], device: Any = None) -> list[Verdict]:
        """Return the verdicts on tensors, from the facts about their writing; on a device of torch, if given."""


class FinishedLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of a run's journal: a tensor and its result, or a copied range of a shard."""

    made: str | None = None
    result: TensorResult | None = None
    copied: tuple[str, Count, Count] | None = None
    """Shard, offset and length."""

    def __post_init__(self) -> None:
        if (self.made is None) != (self.result is None) or (self.made is None) == (self.copied is None):
            raise ValueError("neither a tensor nor a copy")
        if self.result and not all(part.whole for part in self.result.parts):
            raise ValueError("a tensor of the undo record is too long or too short")


@dataclass
class Progress:
    """The copies and tensors that this run and the run it resumes have finished."""

    done: dict[str, TensorResult] = field(default_factory=dict)
    copied: set[tuple[str, int, int]] = field(default_factory=set)

    @classmethod
    def of(cls, lines: Iterable[FinishedLine]) -> Progress:
        """Return the progress that a journal's lines tell."""
        progress = cls()
        for line in lines:
            progress.add(line)
        return progress

    def add(self, line: FinishedLine) -> None:
        """Count what a line of the journal tells."""
        if line.copied:
            self.copied.add(line.copied)
        elif line.made is not None and line.result:
            self.done[line.made] = line.result

    @property
    def spooled(self) -> int:
        """Bytes of the spool that finished tensors use."""
        return max((part.end for result in self.done.values() for part in result.parts), default=0)


GROUP_TENSORS, GROUP_BYTES = 64, 8 << 20
"""The most tensors, and the most bytes of output, that one task writes if it writes several."""
GROUPS = 16
"""The least number of tasks for each worker if tensors are grouped."""


def groups(
    kind: Literal["write", "hash"], items: Sequence[Item], shard_of: Callable[[Item], str], workers: int
) -> Iterator[Task]:
    """Yield tasks for tensors: small neighbours of one shard in one task if there are many, others alone.

    A task that is interrupted is lost. So the tensors of a task are few bytes, and a small part of the whole.
    """
    most = min(GROUP_TENSORS, len(items) // (GROUPS * workers))
    names: list[str] = []
    shard, nbytes = "", 0
    for item in items:
        nbytes += item.nbytes
        alone = item.parts or len(names) >= most or nbytes > GROUP_BYTES or shard != shard_of(item)
        if names and alone:
            yield Task(kind, shard, tuple(names))
            names, nbytes = [], item.nbytes
        shard = shard_of(item)
        names.append(item.name)
    if names:
        yield Task(kind, shard, tuple(names))


def in_turn(tasks: Iterable[Task]) -> list[Task]:
    """Return one task of each shard in turn: the system lets one thread at a time write into a file."""
    turns = Counter[str]()

    def turn(task: Task) -> int:
        turns[task.shard] += 1
        return turns[task.shard]

    return sorted(tasks, key=turn)


def kept_name(tensor: StoredTensor) -> str:
    """Return the name in the undo record of a tensor of the base that is kept whole."""
    return f"whole/{tensor.name}"


def copied_name(item: Item) -> str:
    """Return the name under which the hash of a copied tensor is kept."""
    return f"copied/{item.name}"


def judge(plan: Plan, done: Mapping[str, TensorResult]) -> Verdict:
    """Return the sum of all verdicts; raise VerificationError, naming every tensor that is wrong."""
    known = [(item, verdict) for item in plan.items if item.name in done and (verdict := done[item.name].verdict)]
    faults = [
        Fault(item.name, f"{verdict.wrong} of {verdict.checked} elements, up to {verdict.max_ulp} ulp")
        for item, verdict in known
        if verdict.wrong
    ]
    if faults:
        raise VerificationError(
            f"The self-check failed: {len(faults)} tensors on disk are not what was computed.",
            faults=faults,
            hint="the disk or the memory may be faulty; rerun the same command to write these tensors again",
        )
    verdicts = [verdict for _, verdict in known]
    return Verdict(
        sum(each.checked for each in verdicts),
        sum(each.wrong for each in verdicts),
        max((each.max_ulp for each in verdicts), default=0),
        rounding=sum(each.rounding for each in verdicts),
        change=sum(each.change for each in verdicts),
    )
