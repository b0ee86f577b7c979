"""Give a checkpoint's tensors the names and the grouping that the running model has.

PEFT finds modules and parameters of the running model. Some of its weights are one stored tensor under another
name; others are made of several, or of part of one. The table of families tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..naming.families import INNER, TURNED_EXPERTS
from ..naming.family_map import FamilyMap
from ..naming.resolve import is_head
from ..naming.slots import Slot
from ..naming.table import family_of
from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import StoredTensor
from ..storage.stored_view import view

STACK = 3
"""Dimensions of a stack of experts that is one tensor."""


@dataclass(frozen=True)
class WeightPiece:
    """A stored tensor, or rows of one, that holds outputs of a weight."""

    tensor: StoredTensor
    turned: bool = False
    """True if the tensor is stored as (in, out)."""

    @property
    def matrix(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.tensor.matrix
        return (columns, rows) if self.turned else (rows, columns)


@dataclass(frozen=True)
class JoinedWeight:
    """A weight of the running model that is not one stored matrix: for each expert, its pieces in order."""

    stacks: tuple[tuple[WeightPiece, ...], ...]
    experts: int = 0
    """The number of experts; 0 if the weight is no stack."""

    @property
    def pieces(self) -> Iterator[WeightPiece]:
        """Every piece."""
        return (piece for stack in self.stacks for piece in stack)

    @property
    def sizes(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The outputs and inputs of all pieces."""
        return tuple(tuple(piece.matrix for piece in stack) for stack in self.stacks)


@dataclass
class ModelWeights:
    """A checkpoint's weights by their names in the running model."""

    single: dict[str, StoredTensor] = field(default_factory=dict)
    """Weights that are one stored matrix or vector, or rows of one."""
    joined: dict[str, JoinedWeight] = field(default_factory=dict)
    renamed: Callable[[str], str] = str
    """Returns the name in the running model of a name on disk."""

    @property
    def names(self) -> list[str]:
        """All weights."""
        return [*self.single, *self.joined]


def model_names(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors by their names in the model that the config names."""
    architectures = (checkpoint.config or {}).get("architectures") or [""]
    prefix = next((INNER[kind] for kind in sorted(checkpoint.model_types) if kind in INNER), "")
    bare = str(architectures[0]).endswith("Model") and not str(architectures[0]).endswith("HeadModel")
    known = any(name.startswith(prefix) for name in checkpoint.tensors)
    if not prefix or bare or known:
        return dict(checkpoint.tensors)
    return {name if is_head(name) else prefix + name: tensor for name, tensor in checkpoint.tensors.items()}


def model_weights(checkpoint: Checkpoint) -> ModelWeights:
    """Return a checkpoint's weights as the running model has them."""
    config, says_turned = checkpoint.config or {}, bool(checkpoint.model_types & TURNED_EXPERTS)
    family = family_of(config)
    weights = ModelWeights()
    if not family:
        weights.single = model_names(checkpoint)
    else:
        families = FamilyMap(checkpoint.tensors, family, config)
        weights.renamed = families.renamed
        _fill(weights, families, checkpoint)
    for name, tensor in list(weights.single.items()):
        if len(tensor.shape) == STACK and name.rpartition(".")[2] not in ("weight", "bias") and not tensor.is_view:
            del weights.single[name]
            weights.joined[name] = _stacked(tensor, turned=says_turned)
    return weights


def _fill(weights: ModelWeights, families: FamilyMap, checkpoint: Checkpoint) -> None:
    """Enter every weight of the running model; tensors that no slots tell of keep their names on disk."""
    plain = {tensor.name: name for name, tensor in model_names(checkpoint).items()}
    for name, pieces in families.weights.items():
        slots = families.stored(name)
        if not slots or (slots[0].is_whole and slots[0].name == name):
            stored = [checkpoint.tensors[piece.name] for piece in pieces]
            weights.single |= {plain.get(tensor.name, tensor.name): tensor for tensor in stored}
        elif len(slots) == 1 and not slots[0].transposed:
            weights.single[name] = _shown(slots[0], checkpoint.tensors)
        else:
            weights.joined[name] = _joined(slots, checkpoint.tensors)


def _joined(slots: tuple[Slot, ...], tensors: Mapping[str, StoredTensor]) -> JoinedWeight:
    """Return a weight of several slots: those of each expert in the order of their outputs."""
    stacks: dict[int, list[Slot]] = {}
    for slot in sorted(slots, key=lambda slot: (slot.expert or 0, slot.outputs or (0, 0))):
        stacks.setdefault(slot.expert or 0, []).append(slot)
    shown = (
        tuple(WeightPiece(_shown(slot, tensors), bool(slot.transposed)) for slot in stack) for stack in stacks.values()
    )
    return JoinedWeight(tuple(shown), slots[0].experts)


def _shown(slot: Slot, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    """Return the rows of a slot's tensor in the order of the running model."""
    rows = range(*slot.part) if slot.part else None
    tensor = view(tensors[slot.name], rows=rows)
    if slot.order is None:
        return tensor
    places = sorted(range(len(slot.order)), key=slot.order.__getitem__)
    return view(tensor, rows=places)


def _stacked(tensor: StoredTensor, *, turned: bool) -> JoinedWeight:
    """Return a stack of experts that is one tensor on disk, expert by expert."""
    count, rows, columns = tensor.shape
    matrix = replace(tensor, shape=(count * rows, columns))
    experts = ((WeightPiece(view(matrix, rows=range(e * rows, (e + 1) * rows)), turned),) for e in range(count))
    return JoinedWeight(tuple(experts), count)
