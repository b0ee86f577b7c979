"""Choose how several adapters of a merge are combined, where they are not added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...adapters import Adapter
from ...plan.methods import choose_combination
from ...plan.plan import Options
from ...sources.combined import untouched
from ...storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from . import MergeRequest


def combined(
    request: MergeRequest, checkpoint: Checkpoint, adapters: Sequence[Adapter]
) -> tuple[Options, tuple[float, ...]]:
    """Return the options and weights of a merge that is more than a sum; warn of oddities."""
    warn = request.settings.warn
    combination, strengths = choose_combination(request.options, len(request.adapters), len(adapters), warn)
    for note in untouched(checkpoint, adapters):
        warn(note)
    if request.selection.undo == "norms" and not (combination.is_sum or combination.method == "chain"):
        warn(
            f"--undo norms keeps nothing that takes --method {combination.method} out again: "
            "--undo exact keeps the base's bits, and unmerge needs them"
        )
    return replace(request.selection, combination=combination), strengths
