"""Hold an adapter's headers in one form for all file formats: every update, and the weight that it is for.

The updates of LoRA and DoRA are in this file; `kinds` has the others, which a plain merge does not load.
`W` is the weight as torch's Linear has it, (out, in); convolutions are flattened to (out, in·k…). Tensors are
headers (`StoredTensor`); values are read when a plan is run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Fault
from ..settings import NOTHING as NOTHING
from ..settings import Waived as Waived
from ..storage.filenames import FileStates
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor
from .updates import Decomposed as Decomposed
from .updates import Delta as Delta
from .updates import Full as Full
from .updates import LowRank as LowRank
from .updates import Rows as Rows
from .updates import Start as Start
from .updates import Transform as Transform
from .updates import Update as Update
from .updates import ValueUpdate as ValueUpdate
from .updates import low_rank as low_rank
from .updates import tensors_of as tensors_of
from .updates import transform_of as transform_of

if TYPE_CHECKING:
    from ..storage.checkpoint import Checkpoint
    from .beside import FileBeside


WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names."""


def unwrapped(name: str) -> str:
    """Return a name without the names that training programs put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(frozen=True)
class Change:
    """One update, and the weight that it is for by the weight's name in the model's state dict."""

    target: str
    update: Update
    among: tuple[str, ...] = ()
    """All weights that the update may be for, if only shapes can tell; `target` is one of them."""
    rule: str = ""
    """The formula of the scaling, such as "alpha 16 / rank 8"."""
    outputs: tuple[int, int] | None = None
    """The outputs of the module that the update is for, from the first to before the last; None for all."""

    @property
    def module(self) -> str:
        """The name of the module that owns the target."""
        return self.target.rpartition(".")[0]


Promise = Callable[[Mapping[str, Sequence[int]], Callable[[str], bool]], Collection[str]]
"""Of tensors by name and shape, and a test for linear layers, the names of some."""


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
    base: str | None = None  # the base that the adapter was trained on, as its author named the base
    revision: str | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)  # tensors that a merge leaves out, and the reasons
    faults: tuple[Fault, ...] = ()
    """Contradictions in the adapter. A plan reports them with everything that does not fit."""
    keeps_ties: bool = False  # True if embedding and head were trained as one weight
    layers: tuple[int, ...] = ()
    """The base's layers in the order of the trained model, if layers were repeated or left out."""
    states: FileStates = field(default_factory=dict)
    """The files that a merge reads, as they were before that."""
    task: str | None = None
    """The class of the trained model, such as LlamaForSequenceClassification, or the end of its name."""
    promised: Promise | None = field(default=None, compare=False)
    """Returns the weights that the config says were trained, of a model's tensors by name and shape."""
    beside: tuple[FileBeside, ...] = ()  # the weight files beside the adapter's own
    maker: str | None = None  # the program that wrote the files, if they tell more than the format
    naming: str = "dotted"  # or "components", "flattened": see naming/flattened.py
    fit: Callable[[Adapter, Checkpoint], Adapter] | None = field(default=None, compare=False)
    """Returns the adapter for a base, where the base decides what the files leave open."""
    warnings: tuple[str, ...] = ()

    @property
    def modules(self) -> frozenset[str]:
        """The modules that the adapter changes, by their names in the model."""
        return frozenset(name for each in self.changes for name in (each.module, unwrapped(each.module)))

    @property
    def doubts(self) -> Iterator[str]:
        """Warnings about files beside the adapter that are left out."""
        yield from self.warnings
        if self.beside:
            from .beside import doubts_of

            yield from doubts_of(self.beside, self.source.name)
