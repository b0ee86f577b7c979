"""Translate an adapter's tensor names to the base's, and find tied weights.

Names on disk are names in the model for most families. The table of families has the others, and is read once a name
fails to match.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..adapters import unwrapped
from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import StoredTensor
from .families import COMPOSITE, EMBEDDINGS, HEADLESS, HEADS, HEADS_OF, SCALED, TABLES

if TYPE_CHECKING:
    from .diffusion import DiffusionNames
    from .family_map import FamilyMap
    from .slots import NameMap, Slot


_HEAD_ENDS = tuple(f".{head}.weight" for head in HEADS)


@dataclass(frozen=True)
class Prefix:
    """The beginning of an adapter's names that the base's names lack, and the other way round."""

    drop: str = ""  # with its last dot
    add: str = ""

    def apply(self, name: str) -> str:
        """Return the base's name of a tensor, as far as the prefix decides the name."""
        if not (self.drop or self.add):
            return name
        return self.add + name.removeprefix(self.drop) if name.startswith(self.drop) else name

    def undo(self, name: str) -> str | None:
        """Return the adapter's name of a base's tensor; None if the adapter's model does not have the tensor."""
        if self == Prefix() or (is_head(name) and not self.add):
            return name
        return self.drop + name.removeprefix(self.add) if name.startswith(self.add) else None


class TableOnDemand:
    """The table of families for one checkpoint, read once a name is asked for. A `NameMap`."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base

    @cached_property
    def families(self) -> FamilyMap | None:
        """The names of the checkpoint's tensors in the running model; None if the table does not know the model."""
        from .family_map import FamilyMap
        from .table import family_of

        config = self._base.config or {}
        family = family_of(config)
        return FamilyMap(self._base.tensors, family, config) if family else None

    @cached_property
    def _diffusion(self) -> DiffusionNames:
        """The names of the checkpoint's tensors in the other layout of a diffusion model."""
        from .diffusion import DiffusionNames

        return DiffusionNames(self._base.tensors)

    def stored(self, target: str) -> tuple[Slot, ...] | None:
        """Return the slots of a weight of the running model, or of a diffusion model in its other layout."""
        return self.families.stored(target) if self.families else self._diffusion.stored(target)

    def running(self, name: str) -> str | None:
        """Return the weight of the running model that a stored tensor is part of."""
        return self.families.running(name) if self.families else None


class NameResolver:
    """Translates one adapter's names of weights to the base's names.

    A name that the base has is the base's: adapters of older programs use the names on disk. Other names are those
    of the running model, and the table of families leads to tensors. If neither finds any target, all names may
    differ by one prefix: the adapter was trained on a model without its head, or on a wrapped model. The prefix
    counts if no other prefix leads every name to a tensor.
    """

    def __init__(
        self, tensors: Mapping[str, StoredTensor], targets: Sequence[str], table: NameMap | None = None
    ) -> None:
        """`table` has the names of the running model, for targets that are no names of tensors."""
        self._tensors, self._table = tensors, table
        self._targets = targets
        self.prefix = Prefix()
        self.ambiguous: tuple[Prefix, ...] = ()
        if targets and not any(self.stored(target) for target in targets):
            bare = [unwrapped(target) for target in targets]
            prefixes = self._prefixes(bare, tensors) or self._prefixes(bare, self._weights)
            if len(prefixes) == 1:
                self.prefix = prefixes[0]
            self.ambiguous = prefixes[1:] and prefixes

    @property
    def families(self) -> FamilyMap | None:
        """The names of the base's tensors in the running model; None if no table knows them."""
        return self._table.families if isinstance(self._table, TableOnDemand) else None

    @property
    def _weights(self) -> Mapping[str, object]:
        """The names of the running model's weights, as far as the table knows them."""
        return self.families.weights if self.families else {}

    def find(self, target: str) -> str | None:
        """Return the base's name of a target; None if the base has no such tensor, or the target is several."""
        if name := self._plain(target):
            return name
        slots = self.slots(target)
        return slots[0].name if len(slots) == 1 and slots[0].is_whole else None

    def _plain(self, target: str) -> str | None:
        """Return the tensor that has a target's name, up to the prefix."""
        if (name := self.prefix.apply(target)) in self._tensors:
            return name
        bare = unwrapped(target)
        for name in map(self.prefix.apply, (target,) if bare == target else (target, bare)):
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
        for name in {self.prefix.apply(name): None for name in (target, unwrapped(target))} if self._table else ():
            for candidate in _stored_names(name):
                if self._table and (slots := self._table.stored(candidate)):
                    return slots
        return ()

    def stored(self, target: str) -> tuple[str, ...]:
        """Return the names of all stored tensors that a target is made of."""
        name = self._plain(target)
        return (name,) if name else tuple(slot.name for slot in self.slots(target))

    def places(self, target: str) -> set[tuple[str, tuple[int, int] | None]]:
        """Return the stored tensors that a target is made of, and their outputs if they are not all the target's."""
        if name := self._plain(target):
            return {(name, None)}
        return {(slot.name, slot.part) for slot in self.slots(target)}

    def settled(self, target: str) -> str:
        """Return a target without the names of training programs, unless the base has the target as it is."""
        name = self.prefix.apply(target)
        return target if any(stored in self._tensors for stored in _stored_names(name)) else unwrapped(target)

    def model_shapes(self) -> dict[str, Sequence[int]]:
        """Return the shapes of the weights that the adapter's model has, by the adapter's names.

        The sizes of weights that are not one tensor on disk count for nothing but their number.
        """
        tensors: dict[str, Sequence[int]] = {name: tensor.shape for name, tensor in self._tensors.items()}
        others = [target for target in self._targets if target not in self._tensors]
        if any(not self._plain(target) and self.slots(target) for target in others) and self.families:
            tensors = {name: self.families.shape(name) for name in self.families.weights}
        if self.prefix == Prefix():
            return tensors
        return {own: shape for name, shape in tensors.items() if (own := self.prefix.undo(name))}

    def _prefixes(self, targets: Sequence[str], names: Mapping[str, object]) -> tuple[Prefix, ...]:
        """Return every prefix that leads all targets to names of tensors and drops least.

        No prefix reaches into a stack of layers.
        """
        parts = max(targets, key=lambda target: target.count(".")).split(".")
        for dropped in range(len(parts) - 1):
            if any(part.isdigit() for part in parts[: dropped + 1]):
                break
            drop, rest = "".join(f"{part}." for part in parts[:dropped]), ".".join(parts[dropped:])
            adds = {name.removesuffix(rest) for name in names if f".{name}".endswith(f".{rest}")}
            outside = [Prefix(drop, add) for add in sorted(adds) if not any(map(str.isdigit, add.split(".")))]
            leading = [one for one in outside if all(one.apply(target) in names for target in targets)]
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
    heads = [name for name in base.tensors if is_head(name) and not _is_other_output(name, base)]
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
    modules = (module for module, families in HEADS_OF.items() if families & base.model_types)
    decoder = "decoder." if base.model_types & COMPOSITE else ""
    return f"{decoder}{next(modules, 'lm_head')}.weight"


def _is_other_output(tensor: str, base: Checkpoint) -> bool:
    """Return True for an output layer that only some families use as a head."""
    return tensor.endswith("proj_out.weight") and not base.model_types & HEADS_OF["proj_out"]


def is_embedding(tensor: str) -> bool:
    """Return True if a tensor is an input embedding, by its module's name."""
    module, _, leaf = tensor.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in EMBEDDINGS


def is_head(tensor: str) -> bool:
    """Return True if a tensor is an output head's weight, by its module's name."""
    return f".{tensor}".endswith(_HEAD_ENDS) or tensor == "decoder.weight"


def is_linear(tensor: str) -> bool:
    """Return True if a matrix is a layer's weight: no embedding, no table of positions or types, no head."""
    module, _, leaf = tensor.rpartition(".")
    table = module.rpartition(".")[2] in TABLES
    return leaf == "weight" and not (table or is_embedding(tensor) or is_head(tensor))
