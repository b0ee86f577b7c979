"""Hold the results of finished tensors, and write and read them as lines of a journal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from ..errors import MalformedError
from ..plan.item import Item
from ..storage.journal import Record
from ..storage.safetensors import BITS, StoredTensor
from ..storage.schema import Either, count
from ..storage.spool import Part, Segment
from .shards import Copy

VERDICT = {"checked": int, "wrong": int, "max_ulp": int, "rounding": float, "change": float}
HASH = Either(str, None)
ENTERED = Either(
    {"copied": (str, count, count)},
    {
        "made": str,
        "hashes": (HASH, str, HASH),
        "parts": [(str, frozenset(BITS), [count], [(count, count)])],
        "ambiguous": count,
        "verdict": Either(VERDICT, None),
    },
)
"""What a journal's records are like."""


@dataclass(frozen=True)
class Verdict:
    """The result of a check; the counts of several checks add up."""

    checked: int = 0
    """Elements compared."""
    wrong: int = 0
    """Elements outside the bound."""
    max_ulp: int = 0
    """Largest distance from the rounded float64 result, in units in the last place of the stored dtype."""
    rounding: float = 0.0
    """Σ (rounded − x)², the loss of rounding to the stored dtype."""
    change: float = 0.0
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
        lost = [] if self.lost is None else [("share of the change lost to rounding", f"{self.lost:.2%}")]
        return [
            ("elements compared", f"{self.checked:,}"),
            ("wrong", f"{self.wrong:,}"),
            ("largest distance from the rounded result", f"{self.max_ulp} ulp"),
            *lost,
        ]


@dataclass(frozen=True)
class TensorResult:
    """The facts about a written tensor: hashes of old and new bytes, parts of the undo record, the self-check."""

    base_hash: str | None
    """xxh3-128 of the bytes that were read: the base's in a merge, the merged ones in an unmerge."""
    written_hash: str
    """xxh3-128."""
    proof: str | None
    """sha256 of the base's bytes, read or recovered, if asked for."""
    parts: tuple[Part, ...] = ()
    verdict: Verdict | None = None
    ambiguous: int = 0
    """Elements of a recovered tensor that several values of the base would have given."""


@dataclass
class Progress:
    """The copies and tensors finished so far, by this run and by the run that it resumes."""

    done: dict[str, TensorResult] = field(default_factory=dict)
    copied: set[tuple[str, int, int]] = field(default_factory=set)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Progress:
        """Read back what `copy_record` and `done_record` have written."""
        progress = cls()
        for record in records:
            if "copied" in record:
                shard, target, length = record["copied"]
                progress.copied.add((shard, target, length))
            else:
                parts = tuple(
                    Part(name, dtype, tuple(shape), tuple(Segment(*segment) for segment in segments))
                    for name, dtype, shape, segments in record["parts"]
                )
                if wrong := [part.name for part in parts if not part.whole]:
                    raise MalformedError(f"The journal has too much or too little of {wrong[0]}.")
                verdict = _verdict(record["verdict"])
                base_hash, written_hash, proof = record["hashes"]
                done = TensorResult(base_hash, written_hash, proof, parts, verdict, record["ambiguous"])
                progress.done[record["made"]] = done
        return progress

    @property
    def spooled(self) -> int:
        """The bytes of the spool in use."""
        return max((part.end for done in self.done.values() for part in done.parts), default=0)


def _verdict(found: Record | None) -> Verdict | None:
    return Verdict(**{name: found[name] for name in VERDICT}) if found else None


def kept_name(tensor: StoredTensor) -> str:
    """Return the name in the undo record of a tensor of the base that is kept whole."""
    return f"whole/{tensor.name}"


def copied_name(item: Item) -> str:
    """Return the name under which the hash of a copied tensor is kept."""
    return f"copied/{item.name}"


def copy_record(copy: Copy) -> Record:
    """Return a finished copy as a line of the journal."""
    return {"copied": copy[2:]}


def done_record(name: str, done: TensorResult) -> Record:
    """Return a finished tensor as a line of the journal."""
    return {
        "made": name,
        "hashes": [done.base_hash, done.written_hash, done.proof],
        "parts": done.parts,
        "ambiguous": done.ambiguous,
        "verdict": asdict(done.verdict) if done.verdict else None,
    }
