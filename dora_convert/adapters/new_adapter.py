"""Hold an adapter that is to be written, in one form for all file formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import Fault, UnsupportedError
from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import StoredTensor
from . import Adapter, Change, LowRank, Update, low_rank, tensors_of


@dataclass(frozen=True)
class NewAdapter:
    """Changes whose tensors lie in an old adapter, in a checkpoint, or in a spool of computed tensors."""

    changes: tuple[Change, ...]
    like: Adapter | None = None
    """The old adapter, whose other config fields are carried over."""
    base: str | None = None
    """The base's repo id, if known."""
    revision: str | None = None
    task: str | None = None
    """The class of the model, if `like` does not say."""
    targets: tuple[str, ...] | None = None
    """The modules that have factors, by names or ends of names; () for all names, None for `like`'s field."""
    besides: frozenset[str] = frozenset()
    """The model's other modules, which `targets` must not match."""
    parameters: frozenset[str] = frozenset()
    """The weights that are parameters and not layers' weights, such as stacks of experts."""
    weights: frozenset[str] = frozenset()
    """All weights of the model, if it has such parameters."""
    keeps_ties: bool = False
    """True if embedding and head stay one weight."""
    model: Checkpoint | None = None
    """The base, for formats whose names or order depend on the model's kind."""

    def __post_init__(self) -> None:
        """Check that no weight has two changes with factors, which no format holds; UnsupportedError names them."""
        counts = Counter((each.target, each.outputs) for each in self.changes if low_rank(each.update))
        if twice := [target for (target, _), count in counts.items() if count > 1]:
            raise UnsupportedError(
                "An adapter that is written has one change for each weight.",
                faults=[Fault(target, "is changed twice: by a DoRA, and by what its scaling adds") for target in twice],
                hint="dora-convert merge makes a model of base and adapter",
            )

    def carries(self, update: Update) -> bool:
        """Return True if all tensors of an update are `like`'s own."""
        return self.like is not None and all(
            self.like.tensors.get(tensor.name) is tensor for tensor in tensors_of(update)
        )

    @property
    def low_ranks(self) -> tuple[tuple[Change, LowRank], ...]:
        """Every change that has factors, with its factors."""
        return tuple((change, low) for change in self.changes if (low := low_rank(change.update)))


@dataclass(frozen=True)
class ShapedTensor:
    """A tensor of a new file: a stored one times a number, with zeros behind it, or a single number."""

    source: StoredTensor | None
    shape: tuple[int, ...]
    scale: float = 1.0
    """The factor; the value itself without a source."""
    dtype: str = "F32"


@dataclass(frozen=True)
class Files:
    """The files of an adapter: tensors for one safetensors file, and small files, by name."""

    weights: str
    tensors: Mapping[str, StoredTensor | ShapedTensor]
    small: Mapping[str, bytes]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    keep: frozenset[str] = frozenset()
    """Tensors that keep their dtype even if another one is asked for."""
    folded: bool = False
    """True if scalings went into B."""


class Writer(Protocol):
    """The names of a module that writes a format."""

    def save(self, new: NewAdapter) -> Files:
        """Return the files of a new adapter: headers of tensors by name, and small files."""

    def objection(self, change: Change, tensor: str, like: Adapter) -> str | None:
        """Return why an adapter's LoRA on a weight cannot be a DoRA; None if it can."""

    def shares_rank(self, change: Change, tensor: str, like: Adapter) -> str | None:
        """Return why an adapter's factors for a weight must keep their rank; None if they need not."""
