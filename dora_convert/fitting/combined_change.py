"""Hold one weight that several adapters change, as a job of a fitting plan."""

from __future__ import annotations

from dataclasses import dataclass

from ..adapters import LowRank
from ..plan.item import Item
from .jobs import Job


@dataclass(frozen=True)
class CombinedChange(Job):
    """A weight that adapters change, with all of their edits."""

    item: Item

    @property
    def transposed(self) -> bool:
        """True if the weight is stored as (in, out)."""
        return self.item.edits[0].transposed

    @property
    def lows(self) -> list[LowRank]:
        """The adapters' factors, if their scaled products add up to the change; else empty."""
        edits = self.item.edits
        how = self.item.combination
        adds = how is None or how.method in ("linear", "chain")
        lows = [edit.update for edit in edits if isinstance(edit.update, LowRank) and not edit.update.start]
        plain = all(low.blocks == (1, 1) and not low.b for low in lows)
        return lows if adds and plain and len(lows) == len(edits) else []
