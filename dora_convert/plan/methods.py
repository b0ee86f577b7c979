"""Check the options that say how several adapters are combined, and put them into words again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..adapters import Full
from ..errors import UnsupportedError, UsageError
from ..option_table import Combination
from ..storage.safetensors import FLOATS, StoredTensor
from .item import Edit, Item
from .plan import parse_weights


def choose_combination(
    given: Mapping[str, Any], named: int, count: int, warn: Callable[[str], None]
) -> tuple[Combination, tuple[float, ...]]:
    """Return the combination and the weights of `count` adapters, of which the caller has named the last ones.

    More adapters than are named are the links of a chain. Warns of options that change nothing.
    """
    followed = count > named
    chosen = {**given, "method": given["method"] or ("chain" if followed else None)}
    combination = parse_combination(chosen, count)
    for idle in idle_options(chosen, combination):
        warn(idle)
    if followed and given["weight"]:
        raise UsageError(
            f"--weight is given for a chain of {count} adapters, of which one is named.",
            hint="name BASE and all adapters",
        )
    return combination, parse_weights(given["weight"], count)


def parse_combination(given: Mapping[str, Any], count: int) -> Combination:
    """Return the combination of `count` adapters that options ask for.

    Raises UsageError for a density that is missing or not a share, and for another number of densities.
    """
    plain = Combination(given.get("method") or "sum")
    if not (plain.prunes or plain.draws):
        return plain
    method = plain.method
    densities = tuple(given["density"])
    if not densities:
        raise UsageError(
            f"--method {method} needs --density: the share of each change that is kept.",
            hint="such as --density 0.5, or one --density per ADAPTER; the paper of TIES keeps 0.2",
        )
    if len(densities) not in (1, count):
        raise UsageError(f"{len(densities)} --density for {count} adapters.", hint="give one, or one per ADAPTER")
    for density in densities:
        if not 0 < density <= 1:
            raise UsageError(f"--density {density:g}: a density lies above 0, and is at most 1.")
    if len(densities) == 1:
        densities *= count
    seed = given["seed"] if plain.draws else 0
    return Combination(method, densities, seed, given["majority_sign"] if plain.elects else "total")


def idle_options(given: Mapping[str, Any], combination: Combination) -> Iterator[str]:
    """Yield a warning for each option that the method does not look at."""
    chosen = combination
    for option, is_idle, methods in (
        ("--density", given["density"] and not chosen.densities, "ties, dare, dare-ties, della and magnitude-prune"),
        ("--seed", given["seed"] and not chosen.draws, "dare, dare-ties and della"),
        ("--majority-sign", given["majority_sign"] != "total" and not chosen.elects, "ties, dare-ties and della"),
    ):
        if is_idle:
            yield f"{option} changes nothing with --method {chosen.method}: it is an option of {methods}"


def is_change(update: Full, source: StoredTensor, base: StoredTensor | None, how: Combination) -> bool:
    """Return True if a tensor stored whole is combined by its difference from the base's, instead of replacing it."""
    alike = source is base and source.shape == update.value.shape
    numbers = {update.value.dtype, source.dtype} <= set(FLOATS)
    return how.method != "chain" and alike and numbers and not update.start


def combined(item: Item, how: Combination) -> Item:
    """Return an item with its combination, if its edits are more than a sum."""
    edits = tuple(_fitted(edit, item.source) for edit in item.edits)
    whole = any(isinstance(edit.update, Full) for edit in edits)
    if how.method == "chain" and any(edit.follows for edit in edits[1:]):
        raise UnsupportedError(
            f"{item.name} follows the norms of a weight that the chain changes: that is not computed yet.",
            hint="merge the adapters one by one",
        )
    needed = len(edits) > 1 if how.method == "chain" else edits and (whole or not how.is_sum)
    return replace(item, edits=edits, combination=how if needed else None)


def _fitted(edit: Edit, source: StoredTensor) -> Edit:
    """Return an edit whose tensor, if it is stored whole, has the shape in which the item is computed."""
    if not isinstance(edit.update, Full):
        return edit
    return replace(edit, update=replace(edit.update, value=replace(edit.update.value, shape=source.shape)))
