"""Find the widest weights that an adapter changes: VeRA's random projections are made for these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..adapters import Change
from ..adapters.kinds import Computed
from .item import Edit


def settle(edits: Sequence[list[Edit]], changes: Sequence[Change]) -> None:
    """Enter the most outputs and the most inputs in those of the tensors' edits that the adapter made and need them."""
    mine = {change.update.tensors[0] for change in changes if isinstance(change.update, Computed)}
    found = [
        (own, number, edit.update)
        for own in edits
        for number, edit in enumerate(own)
        if isinstance(edit.update, Computed) and edit.update.widest and edit.update.tensors[0] in mine
    ]
    outputs, inputs = (max((update.shape[side] or 0 for *_, update in found), default=0) for side in (0, 1))
    for own, number, update in found:
        numbers = (*update.numbers, ("outputs", outputs), ("inputs", inputs))
        own[number] = replace(own[number], update=replace(update, numbers=numbers))
