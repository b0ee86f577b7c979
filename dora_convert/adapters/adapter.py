"""Hold an adapter's headers in one form for all file formats: every change, and the weight that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Fault
from ..storage.changes import FileStates
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor
from .updates import Update


@dataclass(frozen=True)
class Change:
    """One update, and the weight that it is for by the weight's name in the model's state dict."""

    target: str
    update: Update
    among: tuple[str, ...] = ()
    """All weights that the update may be for, if only shapes can tell; `target` is one of them."""
    rule: str = ""
    """The formula of the scaling, such as "alpha 16 / rank 8"."""

    @property
    def module(self) -> str:
        """The name of the module that owns the target."""
        return self.target.rpartition(".")[0]


@dataclass(frozen=True)
class Adapter:
    """Everything that a plan needs to know about an adapter."""

    source: Source
    format: str  # "peft"
    kind: str  # "LoRA", "DoRA", "AdaLoRA", …
    changes: tuple[Change, ...]
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]
    """The files whose hashes identify the adapter."""
    base: str | None = None
    """The base that the adapter was trained on, as its author named the base."""
    revision: str | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Tensors that a merge leaves out, with the reason."""
    faults: tuple[Fault, ...] = ()
    """Contradictions in the adapter. A plan reports them with everything that does not fit."""
    keeps_ties: bool = False
    """True if embedding and head were trained as one weight."""
    layers: tuple[int, ...] = ()
    """The base's layers in the order of the trained model, if layers were repeated or left out."""
    states: FileStates = field(default_factory=dict)
    """The files that a merge reads, as they were before their headers were read."""
    task: str | None = None
    """The class of the trained model, such as LlamaForSequenceClassification, or the end of its name."""
