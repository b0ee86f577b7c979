"""Find the widest weights that an adapter changes: VeRA's random projections are made for these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..adapters import Change
from ..adapters.kinds import Computed
from .shapes import TargetTensor


def settle(targets: Mapping[str, TargetTensor], changes: Sequence[Change]) -> None:
    """Enter the most outputs and the most inputs in the adapter's updates that need them."""
    mine = {change.update.tensors[0] for change in changes if isinstance(change.update, Computed)}
    found = [
        (target, number, edit.update)
        for target in targets.values()
        for number, edit in enumerate(target.edits)
        if isinstance(edit.update, Computed) and edit.update.widest and edit.update.tensors[0] in mine
    ]
    outputs, inputs = (max((update.shape[side] or 0 for *_, update in found), default=0) for side in (0, 1))
    for target, number, update in found:
        numbers = (*update.numbers, ("outputs", outputs), ("inputs", inputs))
        target.edits[number] = replace(target.edits[number], update=replace(update, numbers=numbers))
