"""An adapter that is to be written, in one form for all file formats: what `formats/*.save` turns into files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..storage.safetensors import StoredTensor
from .adapter import Adapter, Change
from .updates import Decomposed, LowRank, Update, low_rank, tensors_of


@dataclass(frozen=True)
class NewAdapter:
    """Changes whose tensors lie in the adapter they come from, in a checkpoint, or in a spool of computed ones."""

    changes: tuple[Change, ...]
    like: Adapter | None = None
    """The adapter that this one is made of: what its files say besides is carried over."""
    base: str | None = None
    """The base's repo id, where one is known."""
    revision: str | None = None
    task: str | None = None
    """The class of model that it is for, where `like` does not say."""
    targets: tuple[str, ...] | None = None
    """The modules that have factors, by name or by its end; () for all their names, None for what `like` says."""
    besides: frozenset[str] = frozenset()
    """The model's other modules, none of which must be taken for one of `targets`."""
    keeps_ties: bool = False
    """Whether embedding and head stay one weight."""

    def carries(self, update: Update) -> bool:
        """Whether all tensors of an update are `like`'s own."""
        return self.like is not None and all(
            self.like.tensors.get(tensor.name) is tensor for tensor in tensors_of(update)
        )

    @property
    def low_ranks(self) -> tuple[tuple[Change, LowRank], ...]:
        """Every change that has factors, and them."""
        return tuple(
            (change, low_rank(change.update))
            for change in self.changes
            if isinstance(change.update, LowRank | Decomposed)
        )


@dataclass(frozen=True)
class Files:
    """What a format makes of an adapter: tensors for one safetensors file, and small files, by name."""

    weights: str
    tensors: Mapping[str, StoredTensor]
    small: Mapping[str, bytes]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    keep: frozenset[str] = frozenset()
    """Tensors that stay as they are where a dtype is asked for."""
