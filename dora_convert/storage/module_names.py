"""List the modules that own some tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping


def modules_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return every module that owns one of some tensors, sorted by name under the name of its parent."""
    children: dict[str, set[str]] = {}
    for name in names:
        module = name.rpartition(".")[0]
        children.setdefault(module.rpartition(".")[0], set()).add(module)
    return {parent: sorted(modules) for parent, modules in children.items()}


def kinds_of(modules: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Return the names of modules with `*` for their numbers, sorted, once each."""
    return tuple(sorted({re.sub(r"\d+", "*", name) for names in modules.values() for name in names}))
