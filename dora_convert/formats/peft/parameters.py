"""Find the weights that `target_parameters` means, from the names of modules and the number of their wrappers.

PEFT wraps every parameter whose full name ends with one in the list. So a name without an owner, such as
`gate_up_proj`, means the modules that have such a parameter, and no others. An adapter's file does not say which
modules have one; the wrappers tell, and where they do not, the base.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from .config import Config

REGISTERED = (
    "gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "w1", "v1", "w3", "down_proj", "down_proj_bias", "w2",
)  # fmt: skip
"""Parameters of experts in the order that modules register them: PEFT wraps the first one innermost."""


@dataclass(frozen=True)
class Meant:
    """The parameter that a wrapper is for."""

    target: str
    among: tuple[str, ...] = ()
    """All parameters that it may be for, the outermost first if their order is known."""
    depth: int | None = None
    """The number of wrappers around this one, if the order is known."""


class ParameterTargets:
    """The weights of an adapter that `target_parameters` means."""

    def __init__(self, config: Config, modules: Collection[str], is_targeted: Callable[[str], object]) -> None:
        """`is_targeted` tells modules that `target_modules` means."""
        self._config, self._is_targeted = config, is_targeted
        self._wrappers = Counter(map(outer_of, modules))

    def find(self, module: str, rows: int) -> Meant | str | None:
        """Return the parameter that a module's factors are for, or the reason that none is; None for a plain module.

        `rows` are those of lora_A.
        """
        outer, plain = outer_of(module), rows == self._config.rank(module)
        named, free = self._leaves(outer)
        count = self._wrappers[outer]
        if not (named or free) or (plain and count == 1 and not named and self._is_targeted(outer)):
            return None
        leaves = named if count == len(named) else [*named, *(leaf for leaf in free if leaf not in named)]
        known = len(leaves) == 1 or set(leaves) <= set(REGISTERED)
        ordered = sorted(leaves, key=REGISTERED.index, reverse=True) if known and len(leaves) > 1 else leaves
        depth = module.removeprefix(outer).count(".")
        every = tuple(f"{outer}.{leaf}" for leaf in ordered)
        if count == len(leaves) and known:
            return Meant(every[depth])
        if count > len(leaves):
            return f"is wrapped {count} times for {', '.join(leaves)}"
        fitting = [target for target in every if not rows % self._config.rank(target)]
        numbers = {(self._config.rank(target), self._config.scaling(target)) for target in fitting}
        if len(numbers) != 1:
            return f"may be for any of {', '.join(every)}, whose ranks or scalings differ"
        return Meant(fitting[0], every, depth if known else None)

    def _leaves(self, module: str) -> tuple[list[str], list[str]]:
        """Return the last names in `target_parameters` with an owner that is the module, and those without owner."""
        named: list[str] = []
        free: list[str] = []
        if any(f".{module}".endswith(f".{name}") for name in self._config.modules):
            return named, free
        for name in self._config.parameters:
            owner, _, leaf = name.rpartition(".")
            if not owner:
                free.append(leaf)
            elif f".{module}".endswith(f".{owner}") and leaf not in named:
                named.append(leaf)
        return named, free


def outer_of(module: str) -> str:
    """Return a module's name without the `.base_layer` that each wrapper inside another one adds."""
    return re.sub(r"(\.base_layer)+$", "", module)
