"""Hold what a run has finished: results by tensor, and the lines of a journal that tell of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from ..errors import MalformedError
from ..plan.item import Item
from ..storage.json_files import Count, Real
from ..storage.safetensors import StoredTensor
from ..storage.spool import SpooledTensor

VERDICT = {"checked": int, "wrong": int, "max_ulp": int, "rounding": float, "change": float}


@dataclass(frozen=True)
class Verdict:
    """The result of a check; the counts of several add up."""

    checked: int = 0
    """Elements compared."""
    wrong: int = 0
    """Elements outside the bound."""
    max_ulp: int = 0
    """Largest distance from the rounded float64 result, in units in the last place of the stored dtype."""
    rounding: Real = 0.0
    """Σ (rounded − x)², which rounding into the stored dtype takes away."""
    change: Real = 0.0
    """Σ (x − W)², the adapter's change."""

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
        """Share of the change's norm lost to rounding; None where nothing changes."""
        return math.sqrt(self.rounding / self.change) if self.change else None

    def rows(self) -> list[tuple[str, str]]:
        """Return labels and values, as a model card shows them."""
        lost = [] if self.lost is None else [("share of the change lost to rounding", f"{self.lost:.2%}")]
        return [
            ("elements compared", f"{self.checked:,}"),
            ("wrong", f"{self.wrong:,}"),
            ("largest distance from the rounded result", f"{self.max_ulp} ulp"),
            *lost,
        ]


@dataclass(frozen=True)
class TensorResult:
    """A written tensor: hashes of its old and new bytes, its part of the undo record, its self-check."""

    base_hash: str | None
    """xxh3-128 of the bytes that were read: the base's, or the merged ones where the base is recovered."""
    written_hash: str
    """xxh3-128."""
    proof: str | None
    """sha256 of the base's bytes, read or recovered, where a proof is asked for."""
    parts: tuple[SpooledTensor, ...] = ()
    verdict: Verdict | None = None
    ambiguous: Count = 0
    """Elements of a recovered tensor for which the base may have held one of several values."""


class FinishedLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of a run's journal: a tensor and what is known of it, or a copied range of a shard."""

    made: str | None = None
    result: TensorResult | None = None
    copied: tuple[str, Count, Count] | None = None
    """Shard, offset and length."""

    def __post_init__(self) -> None:
        if (self.made is None) != (self.result is None) or (self.made is None) == (self.copied is None):
            raise ValueError("neither a tensor nor a copy")


@dataclass
class Progress:
    """The copies and tensors that this run and the run it resumes have finished."""

    done: dict[str, TensorResult] = field(default_factory=dict)
    copied: set[tuple[str, int, int]] = field(default_factory=set)

    @classmethod
    def of(cls, lines: Iterable[FinishedLine]) -> Progress:
        """Return the progress that a journal's lines tell; raise MalformedError for parts of a wrong size."""
        progress = cls()
        for line in lines:
            if line.copied:
                progress.copied.add(line.copied)
            elif line.made is not None and line.result:
                if wrong := [part.name for part in line.result.parts if not part.whole]:
                    raise MalformedError(f"The journal has too much or too little of {wrong[0]}.")
                progress.done[line.made] = line.result
        return progress

    @property
    def spooled(self) -> int:
        """Bytes of the spool that finished tensors use."""
        return max((part.end for result in self.done.values() for part in result.parts), default=0)


def kept_name(tensor: StoredTensor) -> str:
    """Return the undo record's name for a whole tensor of the base."""
    return f"whole/{tensor.name}"


def copied_name(item: Item) -> str:
    """Return the name under which results keep the hash of a copied tensor."""
    return f"copied/{item.name}"
