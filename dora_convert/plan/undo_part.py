"""Hold one tensor's part of an undo record, as a plan knows it."""

from __future__ import annotations

from dataclasses import dataclass

from ..storage.safetensors import StoredTensor


@dataclass(frozen=True)
class Undo:
    """One tensor's part of an undo record. An item that has one takes its edits out again."""

    norms: tuple[StoredTensor | None, ...] = ()
    """For each edit, ‖W + sBA‖ before the merge; None if the edit sets no magnitudes."""
    taken: tuple[StoredTensor, StoredTensor] | None = None
    """The part of W that training began without, as factors (rows, r) and (r, columns)."""
    kept: tuple[StoredTensor, StoredTensor] | None = None
    """The base's replaced rows, and their numbers."""
    ulps: StoredTensor | None = None
    """The differences that rounding made, packed."""
    original: StoredTensor | None = None
    """The base's own tensor, if norms must be computed from the base."""

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Every tensor of this part."""
        return tuple(filter(None, (*self.norms, *(self.taken or ()), *(self.kept or ()), self.ulps, self.original)))
