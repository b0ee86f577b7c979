"""Hold an adapter's headers in one form for all file formats: every update, and the weight that it is for.

`W` is the weight as torch's Linear has it, (out, in); convolutions are flattened to (out, in·k…). Tensors are
headers (`StoredTensor`); values are read when a plan is run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Fault
from ..storage.filenames import FileStates
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor

if TYPE_CHECKING:
    from ..storage.checkpoint import Checkpoint
    from .facts import Facts


class Start(Enum):
    """The change of the base before training: a low-rank part of W was moved or taken out."""

    PISSA = "PiSSA"  # W − top r of its SVD (arXiv:2404.02948)
    OLORA = "OLoRA"  # W − s·QR, the first r of its QR factors (arXiv:2406.01775)
    KASA = "KaSA"  # W − the last r of its SVD (arXiv:2412.06071)


@dataclass(frozen=True)
class LowRank:
    """W' = W + s·B·diag(d)·A (LoRA, equation 3 of arXiv:2106.09685, which has no d)."""

    A: StoredTensor  # (r, in, …)
    B: StoredTensor  # (out, r, …)
    scale: float  # s
    transposed: bool | None = None
    """True if W is stored as (in, out), as embeddings are; False for convolutions; None if only the base can
    tell (torch's Linear or GPT-2's Conv1D, and experts)."""
    d: StoredTensor | None = None  # r elements: AdaLoRA (arXiv:2303.10512), KaSA
    blocks: tuple[int, int] = (1, 1)
    """The numbers of blocks on the diagonals of A and B (BD-LoRA): A is then stored as (r, in/blocks), B as
    (out, r/blocks), the blocks one below the other."""
    experts: int = 0
    """The number of experts if W is (experts, …): A is stored as (experts·r, in), expert after expert; B as
    (out, r·experts), the expert varying fastest (PEFT's ParamWrapper)."""
    square: tuple[bool, bool] = (False, False)
    """True if square experts are (in, out): for models that say so of themselves, and for others."""
    start: Start | None = None
    rslora: bool = False
    """True if s is alpha/√r instead of alpha/r."""

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0] // (self.experts or 1)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The shape of one row of A as a factor: (in, …)."""
        return (self.A.shape[1] * self.blocks[0], *self.A.shape[2:])

    @property
    def outputs(self) -> int:
        """The number of rows of B."""
        return self.B.shape[0]


@dataclass(frozen=True)
class Decomposed:
    """W' = m·V/‖V‖ with V = W + s·BA, one norm per output row (DoRA, equation 5 of arXiv:2402.09353)."""

    inner: LowRank
    m: StoredTensor  # out elements, of any shape


@dataclass(frozen=True)
class Delta:
    """W' = W + s·value: the bias that LoRA adds."""

    value: StoredTensor
    scale: float  # s


@dataclass(frozen=True)
class Full:
    """W' = value: a module or a bias saved whole."""

    value: StoredTensor
    may_add: bool = False
    """True if the base may lack the tensor, as with a new classifier."""
    start: Start | None = None
    """The change of the base's weight before training continued on the result."""
    copied: bool = False
    """True if the tensor is in the file for its new rows only, and training changed none of them."""
    file: str = ""
    """The file beside the adapter that brings the value; "" for the adapter's own."""


@dataclass(frozen=True)
class Rows:
    """W'[index] = value: single tokens trained."""

    value: StoredTensor  # (len(index), columns)
    index: tuple[int, ...]


Update = LowRank | Decomposed | Delta | Full | Rows


def tensors_of(update: Update) -> Iterator[StoredTensor]:
    """Yield the adapter tensors of an update."""
    match update:
        case LowRank(A, B):
            yield from (A, B)
            if update.d:
                yield update.d
        case Decomposed(inner, m):
            yield from (*tensors_of(inner), m)
        case Delta(value) | Full(value) | Rows(value):
            yield value


def low_rank(update: LowRank | Decomposed) -> LowRank:
    """Return the low-rank part of an update."""
    return update.inner if isinstance(update, Decomposed) else update


def describe(update: Update) -> str:
    """Return an update's kind and its numbers, in a few words."""
    match update:
        case Full(file=file):
            return f"saved whole in {file}" if file else "saved whole by the adapter"
        case Rows(_, index):
            return f"{len(index)} trained rows"
        case Delta(_, scale):
            return f"LoRA's bias, scaling {scale:g}"
        case LowRank() | Decomposed():
            low = low_rank(update)
            kind = "DoRA" if isinstance(update, Decomposed) else low.start.value if low.start else "LoRA"
            return f"{kind}, rank {low.rank}, scaling {low.scale:g}"


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

    @property
    def module(self) -> str:
        """The name of the module that owns the target."""
        return self.target.rpartition(".")[0]


@dataclass(frozen=True)
class FileBeside:
    """A weight file beside the adapter's own: its name, its fate, and its number of tensors."""

    name: str
    fate: str  # applied | ignored | model: a whole model, which is left out
    tensors: int


@dataclass(frozen=True)
class Waived:
    """The caller's words about adapters: parts that are done without, and facts that no file holds."""

    fields: Collection[str] = ()
    """Config fields that are not refused."""
    files: Collection[str] = ()
    """Files that are left out."""
    facts: Facts | None = None
    """Numbers that no file holds."""


NOTHING = Waived()


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
    promised: Callable[[Mapping[str, Sequence[int]], Callable[[str], bool]], Collection[str]] | None = field(
        default=None, compare=False
    )
    """Returns the weights that the config says were trained, of a model's tensors by name.

    The callable tells linear layers from others.
    """
    beside: tuple[FileBeside, ...] = ()
    """The weight files beside the adapter's own."""
    maker: str | None = None
    """The program that wrote the files, if they say so and the format's name does not."""
    naming: str = "dotted"
    """The form of targets: "dotted", as in the base; "components", where the first word may name a part of a
    pipeline; "flattened", where dots are underscores."""
    fit: Callable[[Adapter, Checkpoint], Adapter] | None = field(default=None, compare=False)
    """Returns an adapter for a base, where the base decides what the files leave open."""
    warnings: tuple[str, ...] = ()
    """Assumptions that a reader made, for the user."""

    @property
    def modules(self) -> frozenset[str]:
        """The modules that the adapter changes, by their names in the model."""
        return frozenset(name for each in self.changes for name in (each.module, unwrapped(each.module)))

    @property
    def doubts(self) -> Iterator[str]:
        """Warnings about files beside the adapter that are left out."""
        for file in self.beside:
            if file.fate == "ignored":
                yield f"{file.name} was left out (--ignore-file): {file.tensors} tensors"
        yield from self.warnings
        if models := [file.name for file in self.beside if file.fate == "model"]:
            yield f"not applied, a model's weights beside {self.source.name}: {', '.join(models)}"
