"""Hold an adapter's headers in one form for all file formats: every update, and the weight that it is for.

The updates of LoRA and DoRA are in this file; `kinds` has the others, which a plain merge does not load.
`W` is the weight as torch's Linear has it, (out, in); convolutions are flattened to (out, in·k…). Tensors are
headers (`StoredTensor`); values are read when a plan is run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..errors import Fault
from ..records import record
from ..settings import NOTHING as NOTHING
from ..settings import Waived as Waived
from ..storage.filenames import WRAPPERS as WRAPPERS
from ..storage.filenames import FileStates
from ..storage.filenames import unwrapped as unwrapped
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor

if TYPE_CHECKING:
    from ..storage.checkpoint import Checkpoint
    from .beside import FileBeside


class Start(Enum):
    """The change of the base before training: a low-rank part of W was moved or taken out."""

    PISSA = "PiSSA"  # W − top r of its SVD (arXiv:2404.02948)
    OLORA = "OLoRA"  # W − s·QR, the first r of its QR factors (arXiv:2406.01775)
    KASA = "KaSA"  # W − the last r of its SVD (arXiv:2412.06071)


class Update:
    """A kind of change to one weight; every kind is a frozen dataclass."""

    follows: ClassVar[bool] = False
    """True for a bias that is scaled as another change scales its weight."""
    widest: bool = False
    """True if the update needs the shape of the adapter's widest weight."""

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Every adapter tensor of the update."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The kind and its numbers, in a few words."""
        raise NotImplementedError


class Transform(Update):
    """A kind of update that makes V of W before any norm is set."""

    scale: float
    """The factor of an addend, s."""
    transposed: bool | None = None
    """True if W is stored as (in, out), as embeddings are; False for convolutions; None if only the base can
    tell (torch's Linear or GPT-2's Conv1D, and experts)."""

    depends: ClassVar[bool] = False
    """True if V − W depends on W."""

    @property
    def outputs(self) -> int | None:
        """The number of outputs that the tensors are for; None if they fit any number."""
        return None

    @property
    def inputs(self) -> tuple[int, ...] | None:
        """The shape of one output's weights, (in, …); None if the tensors fit any."""
        return None

    def shaped(self, outputs: int, inputs: int) -> Transform:  # noqa: ARG002 - for kinds that need it
        """Return the update for a weight of a shape, which some kinds need to know."""
        return self


@record(frozen=True)
class LowRank(Transform):
    """W' = W + s·diag(b)·B·diag(d)·A (LoRA, equation 3 of arXiv:2106.09685, which has neither b nor d)."""

    A: StoredTensor  # (r, in, …)
    B: StoredTensor  # (out, r, …)
    scale: float  # s
    transposed: bool | None = None
    d: StoredTensor | None = None  # r elements: AdaLoRA (arXiv:2303.10512), KaSA, VeRA (arXiv:2310.11454)
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
    b: StoredTensor | None = None  # out elements: VeRA
    widest: bool = False
    """True if A has the columns of the adapter's widest weight, of which the first ones count (VeRA)."""

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

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """A, B, and the diagonals."""
        return (self.A, self.B, *filter(None, (self.d, self.b))) if self.d or self.b else (self.A, self.B)

    @property
    def title(self) -> str:
        """The kind, the rank and the scaling."""
        kind = self.start.value if self.start else "VeRA" if self.b else "LoRA"
        return f"{kind}, rank {self.rank}, scaling {self.scale:g}"


@record(frozen=True)
class Decomposed(Update):
    """W' = m·V/‖V‖ with V = W + s·BA, one norm per output (DoRA, equation 5 of arXiv:2402.09353).

    V is W itself without `inner`, and may be any other `Transform` of W.
    """

    inner: Transform | None
    m: StoredTensor  # one element per row or column of W, of any shape
    axis: str = "rows"  # of W as (out, in): "columns" sets one norm per input
    norm_scale: float | None = None
    """The scaling of the addend inside the norm, if the norm has another one than s."""
    normalised: bool = False
    """True if m multiplies V without a division by ‖V‖: `.rescale`, (IA)³ (arXiv:2205.05638)."""
    offset: float = 0.0
    """A number that is added to each element of m: LyCORIS' (IA)³ stores m − 1."""

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The tensors of `inner`, and m."""
        return (*(self.inner.tensors if self.inner else ()), self.m)

    @property
    def title(self) -> str:
        """The kind and its numbers, in a few words."""
        alone = "scales alone" if self.normalised else "magnitudes alone"
        what = self.inner.title if self.inner else alone
        if isinstance(self.inner, LowRank) and not self.normalised:
            what = what.replace("LoRA", "DoRA", 1)
        elif self.inner:
            what += ", scaled" if self.normalised else ", decomposed"
        return what + (", by columns" if self.axis == "columns" else "")


@record(frozen=True)
class ValueUpdate(Update):
    """An update that is one stored value."""

    value: StoredTensor

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The value alone."""
        return (self.value,)


@record(frozen=True)
class Delta(ValueUpdate):
    """W' = W + s·value: the bias that LoRA adds."""

    scale: float  # s

    @property
    def title(self) -> str:
        """LoRA's bias and its scaling."""
        return f"LoRA's bias, scaling {self.scale:g}"


@record(frozen=True)
class Full(ValueUpdate):
    """W' = value: a module or a bias saved whole."""

    may_add: bool = False
    """True if the base may lack the tensor, as with a new classifier."""
    start: Start | None = None
    """The change of the base's weight before training continued on the result."""
    copied: bool = False
    """True if the tensor is in the file for its new rows only, and training changed none of them."""
    file: str = ""
    """The file beside the adapter that brings the value; "" for the adapter's own."""

    @property
    def title(self) -> str:
        """The file that has the value."""
        return f"saved whole in {self.file}" if self.file else "saved whole by the adapter"


@record(frozen=True)
class Rows(ValueUpdate):
    """W'[index] = value, (len(index), columns): single tokens trained."""

    index: tuple[int, ...]

    @property
    def title(self) -> str:
        """The number of rows."""
        return f"{len(self.index)} trained rows"


def tensors_of(update: Update) -> Iterator[StoredTensor]:
    """Yield the adapter tensors of an update."""
    yield from update.tensors


def transform_of(update: Update) -> Transform | None:
    """Return what an update makes of W before any norm is set; None if that is W itself."""
    inner = update.inner if isinstance(update, Decomposed) else update
    return inner if isinstance(inner, Transform) else None


def low_rank(update: Update) -> LowRank | None:
    """Return the factors of an update; None if it is of another kind."""
    inner = transform_of(update)
    return inner if isinstance(inner, LowRank) else None


@record(frozen=True)
class Change:
    """One update, and the weight that it is for by the weight's name in the model's state dict."""

    target: str
    update: Update
    among: tuple[str, ...] = ()
    """All weights that the update may be for, if only shapes can tell; `target` is one of them."""
    rule: str = ""
    """The formula of the scaling, such as "alpha 16 / rank 8"."""
    depth: int | None = None
    """The place among the changes for one `among`, whose weights are in order; None if only shapes can tell."""
    outputs: tuple[int, int] | None = None
    """The outputs of the module that the update is for, from the first to before the last; None for all."""
    beside: bool = False  # True if the update counts beside another one of the adapter for the same weight

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
    files: tuple[Path, ...]  # whose hashes identify the adapter
    base: str | None = None  # the base that the adapter was trained on, as its author named the base
    revision: str | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)  # tensors that a merge leaves out, and the reasons
    faults: tuple[Fault, ...] = ()
    """Contradictions in the adapter. A plan reports them with everything that does not fit."""
    keeps_ties: bool = False  # True if embedding and head were trained as one weight
    layers: tuple[int, ...] = ()  # the base's, in the order of the trained model, if some were repeated or left out
    states: FileStates = field(default_factory=dict)  # the files that a merge reads, as they were before that
    task: str | None = None  # the class of the trained model, or the end of its name: ForSequenceClassification
    promised: Promise | None = field(default=None, compare=False)
    """Returns the weights that the config says were trained, of a model's tensors by name and shape."""
    beside: tuple[FileBeside, ...] = ()  # the weight files beside the adapter's own
    maker: str | None = None  # the program that wrote the files, if they tell more than the format
    naming: str = "dotted"  # or "components", "flattened": see naming/flattened.py
    fit: Callable[[Adapter, Checkpoint], Adapter] | None = field(default=None, compare=False)
    """Returns the adapter for a base, where the base decides what the files leave open."""
    warnings: tuple[str, ...] = ()
    decided: Mapping[str, str] = field(default_factory=dict)  # by plan/evidence.py, or by an earlier merge

    @property
    def modules(self) -> frozenset[str]:
        """The modules that the adapter changes, by their names in the model."""
        return frozenset(name for each in self.changes for name in (each.module, unwrapped(each.module)))
