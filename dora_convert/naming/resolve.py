"""Translate an adapter's tensor names to the base's, and explain the names that the base does not have.

Names on disk are taken for module names, as most families have them. `families.RENAMED` lists the other
families: they are refused once a name fails to match.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import StoredTensor
from .families import RENAMED
from .ties import is_head

WRAPPER = "module"
"""DistributedDataParallel's name for the model inside it. Formats know the names of other wrappers."""


@dataclass(frozen=True)
class Prefix:
    """The beginning of an adapter's names that the base's names lack, and the other way round."""

    drop: str = ""  # with its last dot
    add: str = ""

    def apply(self, name: str) -> str:
        """Return the base's name of a tensor, as far as the prefix decides the name."""
        return self.add + name.removeprefix(self.drop) if name.startswith(self.drop) else name

    def undo(self, name: str) -> str | None:
        """Return the adapter's name of a base's tensor; None if the adapter's model does not have the tensor."""
        if self == Prefix() or (is_head(name) and not self.add):
            return name
        return self.drop + name.removeprefix(self.add) if name.startswith(self.add) else None


class NameResolver:
    """Translates one adapter's names of weights to the base's names.

    Either the names are equal, or all of them differ by one prefix: the adapter was trained on a model
    without its head, or on a wrapped model. The prefix counts if no other prefix leads every name to a
    tensor.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], targets: Sequence[str]) -> None:
        self._tensors = tensors
        self.prefix = Prefix()
        self.ambiguous: tuple[Prefix, ...] = ()
        if targets and not any(self.find(target) for target in targets):
            prefixes = self._prefixes([unwrapped(target) for target in targets])
            if len(prefixes) == 1:
                self.prefix = prefixes[0]
            self.ambiguous = prefixes[1:] and prefixes

    def find(self, target: str) -> str | None:
        """Return the base's name of a target; None if the base has no such tensor."""
        for name in (self.prefix.apply(target), self.prefix.apply(unwrapped(target))):
            for candidate in _stored_names(name):
                if candidate in self._tensors:
                    return candidate
        return None

    def in_adapter(self, name: str) -> str | None:
        """Return the adapter's name of a base's tensor; None if the adapter's model does not have the tensor."""
        return self.prefix.undo(name)

    def _prefixes(self, targets: Sequence[str]) -> tuple[Prefix, ...]:
        """Return every prefix that leads all targets to tensors and drops least.

        No prefix reaches into a stack of layers.
        """
        parts = max(targets, key=lambda target: target.count(".")).split(".")
        for dropped in range(len(parts) - 1):
            if any(part.isdigit() for part in parts[: dropped + 1]):
                break
            drop, rest = "".join(f"{part}." for part in parts[:dropped]), ".".join(parts[dropped:])
            adds = {name.removesuffix(rest) for name in self._tensors if f".{name}".endswith(f".{rest}")}
            fitting = tuple(Prefix(drop, add) for add in sorted(adds) if self._leads_all(drop, add, targets))
            if fitting:
                return fitting
        return ()

    def _leads_all(self, drop: str, add: str, targets: Sequence[str]) -> bool:
        inside_layers = any(part.isdigit() for part in add.split("."))
        return not inside_layers and all(
            target.startswith(drop) and add + target.removeprefix(drop) in self._tensors for target in targets
        )


def _stored_names(name: str) -> Iterator[str]:
    """Yield a tensor's possible names on disk."""
    yield name
    module, _, leaf = name.rpartition(".")
    if leaf == "weight":
        yield f"{module}.in_proj_weight"  # MultiheadAttention
    if leaf == "bias":
        yield f"{module.removesuffix('.decoder')}.bias"  # the bias of BERT's decoder is its head's


def unwrapped(name: str) -> str:
    """Return a name without the part that a data-parallel wrapper puts in."""
    return ".".join(part for part in name.split(".") if part != WRAPPER)


def explain_missing(target: str, names: NameResolver, base: Checkpoint) -> str:
    """Return why the base has no such tensor: another layout, a missing bias, or a typo."""
    if names.ambiguous:
        examples = ", ".join(prefix.apply(target) for prefix in names.ambiguous[:3])
        return f"could be any of {examples}"
    module, _, leaf = names.prefix.apply(target).rpartition(".")
    if families := sorted(base.model_types & RENAMED):
        return f"{families[0]} checkpoints name tensors otherwise than modules; not matched yet"
    if is_head(target):
        return f"the base has no {target}, and its config does not tie it to the embedding"
    siblings = base.modules.get(module.rpartition(".")[0], ())
    if module in siblings:
        return f"the base's {module} has no {leaf}"
    return f"no such module; closest: {', '.join(closest(module, siblings, base)) or 'none'}"


def closest(module: str, siblings: Sequence[str], base: Checkpoint) -> list[str]:
    """Return up to three names like a missing module's: its siblings', else the most similar."""
    leaf = module.rpartition(".")[2]
    if leaf != module and siblings:
        leaves = [name.rpartition(".")[2] for name in siblings]
        return [f"…{name}" for name in difflib.get_close_matches(leaf, leaves, 3, 0)]
    numbers = re.findall(r"\d+", module)
    return [_numbered(kind, numbers) for kind in _similar(re.sub(r"\d+", "*", module), base.module_kinds)]


def _numbered(kind: str, numbers: Sequence[str]) -> str:
    """Return a kind with its stars replaced by numbers, as many as there are."""
    remaining = iter(numbers)
    return re.sub(r"\*", lambda star: next(remaining, star[0]), kind)


@lru_cache
def _similar(kind: str, kinds: Sequence[str]) -> list[str]:
    """Return similar kinds. Cached: a model has few kinds, however many layers and experts it has."""
    return difflib.get_close_matches(kind, kinds, 3, 0.5)
