"""Say why the base lacks a name that an adapter has: what was tried, and what comes near."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, reduce

from ..storage.checkpoint import Checkpoint
from .resolve import NameResolver, is_head

Modules = Mapping[str, Sequence[str]]


def explain_missing(target: str, names: NameResolver, base: Checkpoint) -> str:
    """Return why the base has no such tensor: an operation, a missing head or bias, or a typo."""
    if names.ambiguous:
        return f"could be any of {', '.join(prefix.apply(target) for prefix in names.ambiguous[:3])}"
    name, families = names.prefix.apply(target), names.families
    if families and (why := families.refusal(name)):
        return why
    if is_head(target):
        return f"the base has no {target}, and its config does not tie it to the embedding"
    module, _, leaf = name.rpartition(".")
    parent = module.rpartition(".")[0]
    trees: list[tuple[Modules, Sequence[str]]] = [(base.modules, base.module_kinds)]
    if families:
        trees.append((families.modules, families.module_kinds))
    if any(module in modules.get(parent, ()) for modules, _ in trees):
        return f"the base's {module} has no {leaf}"
    near = [_closest(module, modules.get(parent, ()), kinds) for modules, kinds in trees]
    closest = list(dict.fromkeys(name for names in near for name in names))[:3]
    return f"no such module{_tried(name, names, base)}; closest: {', '.join(closest) or 'none'}"


def _tried(name: str, names: NameResolver, base: Checkpoint) -> str:
    """Return which other names were tried, in words."""
    if families := names.families:
        renamed = families.renamed(name)
        return f", nor {renamed}, its name in {families.family.name}" if renamed != name else ""
    own_code = "auto_map" in (base.config or {})
    return " by its own name or with one prefix (the model has its own code)" if own_code else ""


def _closest(module: str, siblings: Sequence[str], module_kinds: Sequence[str]) -> list[str]:
    """Return up to three names like a missing module's: its siblings', else the most similar."""
    leaf = module.rpartition(".")[2]
    if leaf != module and siblings:
        leaves = [name.rpartition(".")[2] for name in siblings]
        return [f"…{name}" for name in difflib.get_close_matches(leaf, leaves, 3, 0)]
    numbers = re.findall(r"\d+", module)
    kinds = _similar(re.sub(r"\d+", "*", module), tuple(module_kinds))
    return [reduce(lambda name, number: name.replace("*", number, 1), numbers, kind) for kind in kinds]


@lru_cache
def _similar(kind: str, kinds: Sequence[str]) -> list[str]:
    """Return similar kinds. Cached: a model has few kinds, however many layers and experts it has."""
    return difflib.get_close_matches(kind, kinds, 3, 0.5)
