"""Warn of a config that does not fit its tensors: keys for no module, and modules that it does not target."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

from ...adapters import unwrapped
from .config import Config
from .modules import targets_of
from .patterns import PatternTable, as_key

SHOWN, TRIED = 10, 1000
"""Names in a warning, and keys that are looked at one by one."""


def doubts_of(config: Config, name: str, modules: Collection[str]) -> Iterator[str]:
    """Yield warnings about an adapter, given its modules with factors; the merge goes by the tensors."""
    negative = [alpha for alpha in (config.alpha, *config.alpha_pattern.values()) if alpha < 0]
    if negative:
        yield f"{name} has lora_alpha {negative[0]:g}: it is subtracted, as in PEFT"
    bare = [unwrapped(module) for module in modules if ".base_layer." not in module]
    if config.parameters or len(bare) < len(modules):
        return  # parameters and parts of MultiheadAttention have names of their own
    for field, table in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if table and (idle := list(islice(_idle(table, {*modules, *bare}), SHOWN + 1))):
            yield f"{field} of {name} has keys that match no module of it: {_listed(idle)}"
    if config.target_modules is None:
        return
    targeted = targets_of(config, dict(zip(bare, bare, strict=True)), lambda _: True)  # "all-linear" targets all
    if others := sorted(set(bare) - set(targeted)):
        yield (
            f"{len(others)} modules of {name} have factors, but target_modules and its exceptions leave them out: "
            f"{_listed(others)}. PEFT would not load them; here they count."
        )


def _idle(keys: Iterable[str], modules: Collection[str]) -> Iterator[str]:
    """Yield the keys of a table that match no module."""
    table = PatternTable(dict.fromkeys(keys, 1))
    used = {table.find(module, 0)[1] for module in modules}
    for key in islice((key for key in keys if key not in used), TRIED):
        if not any(re.match(as_key(key), module) for module in modules):
            yield key


def _listed(names: Collection[str]) -> str:
    return ", ".join(list(names)[:SHOWN]) + (" …" if len(names) > SHOWN else "")
