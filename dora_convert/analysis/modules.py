"""Pair each matrix of a base with what an adapter, or a fine-tuned checkpoint, makes of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..adapters import LowRank
from ..errors import PlanError
from ..fitting.model_weights import model_names
from ..fitting.pairs import is_table
from ..naming.families import TURNED_EXPERTS
from ..plan.item import Item
from ..plan.plan import Options, Plan
from ..plan.shapes import is_conv1d
from ..storage.checkpoint import Checkpoint
from ..storage.reader import block_height, spans
from ..storage.safetensors import FLOATS, StoredTensor

MOST_SPECTRUM = 512
"""The smaller side of the largest matrix whose singular values are all computed without being asked for."""
MOST_GRAM = 2048
"""The smaller side of the largest matrix whose σ₁ is computed; a sketch estimates those of larger ones."""
MOST_HELD = 64 << 20
"""Bytes of the largest matrix that is held for its singular values."""
MOST_ELEMENTS = 1 << 24
"""Elements of the largest matrix whose Gram matrix is worth its time; an embedding has more."""
SKETCH = 64
"""Columns of the random sketch of a large ΔW."""
FLOAT32 = 4
SHOWN = 5


@dataclass(frozen=True)
class AnalysedModule:
    """One matrix, or one stack of experts, and its change."""

    item: Item
    """`source` and `edits` make W'; `base` is W."""
    experts: int = 1
    turned: bool = False
    """True if outputs are the columns: GPT-2's Conv1D, and experts of some families."""
    embedding: bool = False
    spectrum: bool = False
    """True if all singular values are asked for."""

    @property
    def name(self) -> str:
        """The module's name; of a parameter that is not called weight, the parameter's."""
        return self.item.name.removesuffix(".weight")

    @property
    def before(self) -> StoredTensor:
        """The base's tensor."""
        assert self.item.base
        return self.item.base

    @property
    def rows(self) -> int:
        """The rows that W and W' both have."""
        return min(self.before.matrix[0], self.item.source.matrix[0])

    @property
    def reads(self) -> tuple[Path, ...]:
        """The files that hold W and W'."""
        return (self.before.path, self.item.source.path)

    @property
    def nbytes(self) -> int:
        """Bytes read, for the progress bar."""
        return self.before.nbytes + (self.item.source.nbytes if self.item.source is not self.item.base else 0)

    @property
    def low(self) -> LowRank | None:
        """The factors whose product is ΔW, if there are such; None if ΔW is of another kind."""
        item = self.item
        if len(item.edits) != 1 or item.rows or item.start or item.source is not item.base:
            return None
        update = item.edits[0].update
        return update if isinstance(update, LowRank) and not update.experts and update.blocks == (1, 1) else None

    @property
    def is_held(self) -> bool:
        """True if ΔW is wider than high, so that it is held for its singular values."""
        rows, columns = self.rows // self.experts, self.before.matrix[1]
        return rows < columns

    @property
    def is_sketched(self) -> bool:
        """True if ΔW is too large for its Gram matrix."""
        rows, columns = self.rows // self.experts, self.before.matrix[1]
        size = FLOAT32 * (rows * columns if self.is_held else columns**2)
        long = rows * columns > MOST_ELEMENTS and not self.spectrum
        return min(rows, columns) > MOST_GRAM or size > MOST_HELD or long

    @property
    def is_complete(self) -> bool:
        """True if all singular values are computed, not σ₁ alone."""
        return self.spectrum or min(self.rows // self.experts, self.before.matrix[1]) <= MOST_SPECTRUM

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the blocks of rows; no block holds rows of two experts."""
        return spans(self.rows, self.before.matrix[1], self.experts)

    def cost(self, width: int) -> int:
        """Return the bytes that a worker holds: blocks of W, W' and ΔW, factors, and what the spectrum needs."""
        rows, columns = self.rows // self.experts, self.before.matrix[1]
        block = block_height(rows, columns) * columns
        small = min(rows, columns)
        spectrum = 3 * FLOAT32 * small**2 + (FLOAT32 * rows * columns if self.is_held else 0)
        if self.low:
            spectrum = 8 * self.low.rank * (rows + columns)
        elif self.is_sketched:
            spectrum = 4 * 8 * SKETCH * columns
        host = block * (self.before.itemsize + self.item.source.itemsize)
        norms = 3 * 8 * (self.rows + 2 * columns)
        return self.item.cost(width) + host + block * (4 * width + 4) + spectrum + norms


@dataclass
class PairedTensors:
    """The matrices and the vectors of one series' step, and sentences on what was left out."""

    spectrum: bool = False
    modules: list[AnalysedModule] = field(default_factory=list)
    vectors: list[Item] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, item: Item, model_types: frozenset[str]) -> None:
        """Enter a tensor that may have changed."""
        assert item.base
        if len(item.shape) < 2 or 0 in item.shape:
            self.vectors.append(item)
            return
        experts = item.shape[0] if is_stack(item.name, item.shape) else 1
        if experts > 1 or is_stack(item.name, item.shape):
            item = replace(item, source=_stacked(item.source), base=_stacked(item.base))
            turned = bool(model_types & TURNED_EXPERTS) or any(edit.transposed for edit in item.edits)
        else:
            turned = is_conv1d(item.name, model_types)
        embedding = is_table(item.name)
        self.modules.append(AnalysedModule(item, experts, turned, embedding=embedding, spectrum=self.spectrum))


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Return True for a tensor of experts; a convolution has three dimensions, too, and is called weight."""
    return len(shape) == 3 and (".experts." in name or not name.endswith(".weight"))


def _stacked(tensor: StoredTensor) -> StoredTensor:
    """Return experts as one matrix, one below the other."""
    if len(tensor.shape) != 3:
        return tensor
    return replace(tensor, shape=(tensor.shape[0] * tensor.shape[1], tensor.shape[2]))


def pair_plan(plan: Plan, *, spectrum: bool) -> PairedTensors:
    """Return the tensors that an adapter changes."""
    pairing, added, grown = PairedTensors(spectrum), [], []
    for item in plan.items:
        if not item.changed:
            continue
        if item.base is None or item.source.dtype not in FLOATS or item.base.dtype not in FLOATS:
            added.append(item.name)
            continue
        if item.grown or item.shape[:1] != item.base.shape[:1]:
            grown.append(item.name)
        pairing.add(item, plan.base.model_types)
    _warn(pairing, "have no counterpart in BASE: not analysed", added)
    _warn(pairing, "have another number of rows than in BASE: the rows that both have are compared", grown)
    return pairing


def pair_checkpoint(base: Checkpoint, tuned: Checkpoint, options: Options, *, spectrum: bool) -> PairedTensors:
    """Return the tensors of two checkpoints, by their names in the model.

    Raises PlanError if no matrix of TUNED is one of BASE.
    """
    before, after = model_names(base), model_names(tuned)
    types = base.model_types | tuned.model_types
    pairing, strange, grown = PairedTensors(spectrum), [], []
    for name, tensor in after.items():
        if not options.selects(name.rpartition(".")[0]):
            continue
        old = before.get(name)
        if old is None or not {old.dtype, tensor.dtype} <= set(FLOATS) or old.shape[1:] != tensor.shape[1:]:
            strange.append(name)
            continue
        if old.shape != tensor.shape:
            grown.append(name)
        pairing.add(Item(name, tensor.dtype, tensor.shape, tensor, old, origin=name), types)
    if not pairing.modules:
        raise PlanError(
            f"No matrix of {tuned.source.name} has a counterpart in {base.source.name}.",
            hint="is this a fine-tuned copy of BASE?",
        )
    _warn(pairing, f"of {tuned.source.name} have no counterpart in BASE: not analysed", strange)
    _warn(pairing, "have another number of rows than in BASE: the rows that both have are compared", grown)
    missing = [name for name in before if name not in after and options.selects(name.rpartition(".")[0])]
    _warn(pairing, f"of BASE are not in {tuned.source.name}: not analysed", missing)
    return pairing


def _warn(pairing: PairedTensors, what: str, names: Collection[str]) -> None:
    """Note that some tensors are left out, if there are any."""
    if names:
        shown = ", ".join(list(names)[:SHOWN]) + (" …" if len(names) > SHOWN else "")
        pairing.warnings.append(f"{len(names)} tensors {what}: {shown}")


def needs_of(modules: Mapping[str, AnalysedModule]) -> dict[str, tuple[Path, ...]]:
    """Return the files that each module reads, modules of the same file together."""
    return {name: each.reads for name, each in sorted(modules.items(), key=lambda pair: pair[1].reads)}
