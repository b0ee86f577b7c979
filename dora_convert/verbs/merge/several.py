"""Choose how several adapters of a merge are combined, where they are not added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...adapters import Adapter
from ...options import MergeOptions
from ...plan.methods import choose_combination
from ...plan.plan import Options
from ...sources.combined import untouched
from ...storage.checkpoint import Checkpoint


def combined(
    options: MergeOptions,
    given: int,
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    *,
    selection: Options,
    warn: Callable[[str], None],
) -> tuple[Options, tuple[float, ...]]:
    """Return the options and weights of a merge that is more than a sum; warn of oddities.

    `given` is the number of adapters that the caller named; a chain may have more.
    """
    combination, strengths = choose_combination(options, given, len(adapters), warn)
    for note in untouched(checkpoint, adapters):
        warn(note)
    if selection.undo == "norms" and not (combination.is_sum or combination.method == "chain"):
        warn(
            f"--undo norms keeps nothing that takes --method {combination.method} out again: "
            "--undo exact keeps the base's bits, and unmerge needs them"
        )
    return replace(selection, combination=combination), strengths
