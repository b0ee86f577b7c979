"""An adapter as headers: which weight each tensor speaks about, in one form for all file formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Fault
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor
from .updates import Update


@dataclass(frozen=True)
class Change:
    """One update and the weight it is for, by the name that the model's state dict has for it."""

    target: str
    update: Update
    among: tuple[str, ...] = ()
    """All the weights that it may be for, where only shapes can tell: `target` is one of them."""
    rule: str = ""
    """How its scaling came about, such as "alpha 16 / rank 8"."""

    @property
    def module(self) -> str:
        """The name of the module that owns the target."""
        return self.target.rpartition(".")[0]


@dataclass(frozen=True)
class Adapter:
    """Everything a plan needs to know of an adapter."""

    source: Source
    format: str  # "peft"
    kind: str  # "LoRA", "DoRA", "AdaLoRA", …
    changes: tuple[Change, ...]
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]
    """The files that define it: their hashes identify the adapter."""
    base: str | None = None
    """The base it was trained on, as its author named it."""
    revision: str | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Tensors that take no part in a merge, with the reason."""
    faults: tuple[Fault, ...] = ()
    """What contradicts itself in it, for the plan to report with all that does not fit."""
    keeps_ties: bool = False
    """Whether embedding and head were trained as one weight."""
    layers: tuple[int, ...] = ()
    """The base's layers in the order of the trained model, where some were repeated or left out."""
    task: str | None = None
    """The class of model it was trained in, such as LlamaForSequenceClassification, or how that ends."""
