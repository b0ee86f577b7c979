"""Translate an adapter's tensor names to the base's, explain names that the base lacks, and find tied weights.

Names on disk are taken for module names, as most families have them. `families.RENAMED` lists the other
families: they are refused once a name fails to match.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING

from ..adapters import unwrapped
from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import StoredTensor
from .families import EMBEDDINGS, HEADLESS, HEADS, OTHER_HEADS, RENAMED, SCALED

if TYPE_CHECKING:
    from .slots import NameMap, Slot


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

    def __init__(
        self, tensors: Mapping[str, StoredTensor], targets: Sequence[str], table: NameMap | None = None
    ) -> None:
        """`table` has the names of the running model, for targets that are no names of tensors."""
        self._tensors, self._table = tensors, table
        self.prefix = Prefix()
        self.ambiguous: tuple[Prefix, ...] = ()
        if targets and not any(self.stored(target) for target in targets):
            prefixes = self._prefixes([unwrapped(target) for target in targets])
            if len(prefixes) == 1:
                self.prefix = prefixes[0]
            self.ambiguous = prefixes[1:] and prefixes

    def find(self, target: str) -> str | None:
        """Return the base's name of a target; None if the base has no such tensor, or the target is several."""
        if name := self._plain(target):
            return name
        slots = self.slots(target)
        return slots[0].name if len(slots) == 1 and slots[0].is_whole else None

    def _plain(self, target: str) -> str | None:
        """Return the tensor that has a target's name, up to the prefix."""
        for name in (self.prefix.apply(target), self.prefix.apply(unwrapped(target))):
            for candidate in _stored_names(name):
                if candidate in self._tensors:
                    return candidate
        return None

    def slots(self, target: str) -> tuple[Slot, ...]:
        """Return the stored tensors that a weight of the running model is made of; none if the base has none.

        A weight that is one tensor under its own name has one slot, too.
        """
        if name := self._plain(target):
            from .slots import Slot

            return (Slot(name),)
        for name in {target: None, unwrapped(target): None} if self._table else ():
            if self._table and (slots := self._table.stored(name)):
                return slots
        return ()

    def stored(self, target: str) -> tuple[str, ...]:
        """Return the names of all stored tensors that a target is made of."""
        name = self.find(target)
        return (name,) if name else tuple(slot.name for slot in self.slots(target))

    def settled(self, target: str) -> str:
        """Return a target without the names of training programs, unless the base has the target as it is."""
        name = self.prefix.apply(target)
        return target if any(stored in self._tensors for stored in _stored_names(name)) else unwrapped(target)

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
            outside = [Prefix(drop, add) for add in sorted(adds) if not any(map(str.isdigit, add.split(".")))]
            leading = [one for one in outside if all(one.apply(target) in self._tensors for target in targets)]
            if leading:
                return tuple(leading)
        return ()


def _stored_names(name: str) -> Iterator[str]:
    """Yield a tensor's possible names on disk."""
    yield name
    module, _, leaf = name.rpartition(".")
    if leaf == "weight":
        yield f"{module}.in_proj_weight"  # MultiheadAttention
    if leaf == "bias":
        yield f"{module.removesuffix('.decoder')}.bias"  # the bias of BERT's decoder is its head's


def explain_missing(target: str, names: NameResolver, base: Checkpoint) -> str:
    """Return why the base has no such tensor: another layout, a missing bias, or a typo."""
    if names.ambiguous:
        return f"could be any of {', '.join(prefix.apply(target) for prefix in names.ambiguous[:3])}"
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
    kinds = _similar(re.sub(r"\d+", "*", module), base.module_kinds)
    return [reduce(lambda name, number: name.replace("*", number, 1), numbers, kind) for kind in kinds]


@lru_cache
def _similar(kind: str, kinds: Sequence[str]) -> list[str]:
    """Return similar kinds. Cached: a model has few kinds, however many layers and experts it has."""
    return difflib.get_close_matches(kind, kinds, 3, 0.5)


@dataclass(frozen=True)
class Tie:
    """The names of a tied embedding and head.

    An adapter that changes one side only makes two weights of the one: training left the other side as it was.
    """

    embedding: str
    head: str
    stored: bool = False
    """True if the head is on disk, too."""
    refusal: str | None = None
    """The reason if adapters on either tensor cannot be merged."""


def find_tie(base: Checkpoint, tasks: Collection[str] = ()) -> Tie | None:
    """Return the tie between a base's head and its input embedding; None if they are two weights.

    `tasks` are model classes, or ends of their names, that the base was trained inside: a bare model has no
    head of its own.

    Without a flag in the config, transformers' default holds: tied, if the architecture has a head and the
    checkpoint has none, or has the same bytes under both names.
    """
    heads = [name for name in base.tensors if is_head(name)]
    embeddings = [name for name in base.tensors if is_embedding(name)]
    if not (base.config and embeddings):
        return None
    embedding = min(embeddings, key=len)
    first, *others = (base.tensors[name] for name in (embedding, *heads))
    shared = any((first.path, first.start) == (other.path, other.start) for other in others)
    if not _says_tied(base, tasks, default=shared or not heads):
        return None
    head = heads[0] if heads else _absent_head(embedding, base)
    refusal = None
    if base.model_types & SCALED or embedding.endswith("shared.weight"):
        refusal = f"{embedding} is tied to more than the output head; adapters on it are not merged"
    elif len(embeddings) > 1 or len(heads) > 1:
        refusal = "the base has several embeddings or heads that may be tied; adapters on them are not merged"
    return Tie(embedding, head, bool(heads), refusal)


def _says_tied(base: Checkpoint, tasks: Collection[str], *, default: bool) -> bool:
    """Return True if the config ties them, for architectures that have a head."""
    values = (config.get("tie_word_embeddings") for config in base.configs)
    flags = [flag for flag in values if isinstance(flag, bool)]
    architectures = (base.config or {}).get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if any(map(_has_head, tasks)):
        names = [name for name in names if _has_head(name)] or list(tasks)
    return (flags[0] if flags else default and bool(names)) and all(map(_has_head, names))


def _has_head(architecture: str) -> bool:
    """Return True if models of a class predict tokens."""
    return architecture.endswith("HeadModel") or not architecture.endswith(HEADLESS)


def _absent_head(embedding: str, base: Checkpoint) -> str:
    """Return the name of a head that is not on disk."""
    prefix, nested, _ = embedding.partition("language_model.model.")
    if nested:
        return f"{prefix}language_model.lm_head.weight"
    modules = (module for family, module in OTHER_HEADS.items() if family in base.model_types)
    return f"{next(modules, 'lm_head')}.weight"


def is_embedding(tensor: str) -> bool:
    """Return True if a tensor is an input embedding, by its module's name."""
    module, _, leaf = tensor.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in EMBEDDINGS


def is_head(tensor: str) -> bool:
    """Return True if a tensor is an output head's weight, by its module's name."""
    return f".{tensor}".endswith(tuple(f".{head}.weight" for head in HEADS))
