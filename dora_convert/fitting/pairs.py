"""A base and its fine-tuned self, tensor by tensor: what can be factors, what must be saved whole, what is left.

Names are the model's: checkpoints saved without their head (GPT-2's on the Hub) get the prefix that the whole model has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Fault
from ..naming.families import HEAD_TOPS, INNER, RENAMED, TABLES
from ..naming.ties import Tie, find_tie, is_embedding, is_head
from ..plan.options import Options
from ..plan.shapes import is_conv1d
from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import FLOATS, StoredTensor
from .jobs import HELD


@dataclass(frozen=True)
class Pair:
    """One weight before and after fine-tuning."""

    name: str
    base: StoredTensor
    tuned: StoredTensor
    transposed: bool
    """Whether it is stored as (in, out), as embeddings and GPT-2's Conv1D are."""
    cost: int
    embedding: bool = False

    @property
    def nbytes(self) -> int:
        """What is read."""
        return self.base.nbytes + self.tuned.nbytes

    @property
    def reads(self) -> tuple[Path, ...]:
        """The files that both are in."""
        return (self.base.path, self.tuned.path)


@dataclass
class Sorted:
    """What becomes of every tensor that differs."""

    pairs: list[Pair] = field(default_factory=list)
    whole: dict[str, StoredTensor] = field(default_factory=dict)
    """Saved as TUNED has them, by name."""
    skipped: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keeps_ties: bool = False


def model_names(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """A checkpoint's tensors by the names that they have in the model its config names."""
    architectures = (checkpoint.config or {}).get("architectures") or [""]
    prefix = next((INNER[kind] for kind in sorted(checkpoint.model_types) if kind in INNER), "")
    bare = str(architectures[0]).endswith("Model") and not str(architectures[0]).endswith("HeadModel")
    known = any(name.startswith(prefix) for name in checkpoint.tensors)
    if not prefix or bare or known:
        return dict(checkpoint.tensors)
    return {name if is_head(name) else prefix + name: tensor for name, tensor in checkpoint.tensors.items()}


class Sorting:
    """What becomes of each tensor: of those that differ, or of all where that is not known."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        differing: Collection[str] | None,
        options: Options,
        *,
        embeddings: str,
        kind: str,
        single: bool,
    ) -> None:
        self._types = base.model_types | tuned.model_types
        self._before, self._after = model_names(base), model_names(tuned)
        self._differing, self._options, self._embeddings = differing, options, embeddings
        self._held = HELD[kind] * (4 if single else 8)
        self._tie: Tie | None = find_tie(tuned)
        self._found = Sorted()
        if renamed := sorted(self._types & RENAMED):
            self._found.notes.append(
                f"{renamed[0]} checkpoints name tensors otherwise than modules: PEFT may not find all of them"
            )

    def run(self) -> Sorted:
        """Decide. Factors first, since a bias is saved in another way where its weight has some."""
        names = [name for name in self._after if self._concerns(name)]
        left = [name for name in names if not self._factored(name)]
        for name in left:
            self._rest(name)
        self._missing()
        self._close()
        return self._found

    def _concerns(self, name: str) -> bool:
        if not self._options.selects(name.rpartition(".")[0]):
            return False
        return self._differing is None or name in self._differing or name not in self._before

    def _factored(self, name: str) -> bool:
        """Whether a tensor gets factors; it is entered then."""
        after, before = self._after[name], self._before.get(name)
        table = is_table(name)
        if not name.endswith(".weight") or len(after.shape) != 2 or before is None:
            return False
        if (table or is_head(name)) and (self._embeddings != "lora" or before.shape != after.shape):
            return False
        if before.shape != after.shape or not {before.dtype, after.dtype} <= set(FLOATS):
            return False
        if self._is_tied(name) and not self._refused(name):
            why = "is tied to its head: PEFT merges factors of such an embedding wrongly"
            self._found.faults.append(Fault(name, f"{why}; --embeddings full or skip"))
        if self._is_tied(name):
            return True
        turned = table or is_conv1d(name, self._types)
        cost = self._held * after.numel + (16 << 20)
        self._found.pairs.append(Pair(name, before, after, turned, cost, table))
        return True

    def _rest(self, name: str) -> None:
        """A tensor without factors: saved whole with its module, or left out."""
        after, before = self._after[name], self._before.get(name)
        resized = before is not None and before.shape != after.shape
        table = is_table(name) or is_head(name)
        if resized and not table:
            self._found.faults.append(Fault(name, f"is {after.shape} in TUNED and {before.shape} in BASE"))  # type: ignore[union-attr]
        elif self._embeddings == "skip" and before is not None:
            if resized:
                why = f"has {after.shape[0]} rows in TUNED: its new tokens cannot be left out"
                self._found.faults.append(Fault(name, f"{why}; --embeddings full"))
            self._found.skipped.append(name)
        else:
            if resized and self._embeddings == "lora":
                self._found.notes.append(f"{name} is saved whole: it has another number of rows than BASE's")
            self._save(name)

    def _save(self, name: str) -> None:
        module, _, leaf = name.rpartition(".")
        parts = [other for other in self._after if other.startswith(f"{module}.")]
        inside = next((other for other in parts if "." in other[len(module) + 1 :]), "")
        adapted = any(pair.name == f"{module}.weight" for pair in self._found.pairs)
        if leaf == "bias" and (adapted or inside):
            self._found.whole[name] = self._after[name]  # a bias may come alone
        elif self._refused(name):
            pass
        elif inside:
            why = f"belongs to a module that has others inside, such as {inside}: no adapter holds it"
            self._found.faults.append(Fault(name, f"{why}; --embeddings skip leaves it out"))
        else:
            self._save_module(module)
            if self._tie and self._is_tied(name) and not self._tie.stored:
                self._found.keeps_ties = True
                self._found.whole[self._tie.head] = self._after[name]
                head = self._tie.head.rpartition(".")[0]
                if bias := self._after.get(f"{head.rpartition('.')[0]}.bias"):  # BERT's is the decoder's, too
                    self._found.whole[f"{head}.bias"] = bias

    def _is_tied(self, name: str) -> bool:
        return self._tie is not None and name in (self._tie.embedding, self._tie.head)

    def _refused(self, name: str) -> bool:
        """Whether a tensor is tied in a way that no adapter holds; it is entered then."""
        if not (self._tie and self._tie.refusal and self._is_tied(name)):
            return False
        self._found.faults.append(Fault(name, f"{self._tie.refusal}; --embeddings skip leaves it out"))
        return True

    def _save_module(self, module: str) -> None:
        """Everything that a module owns, and none of it as factors."""
        self._found.whole |= {n: x for n, x in self._after.items() if n.rpartition(".")[0] == module}
        self._found.pairs = [pair for pair in self._found.pairs if pair.name.rpartition(".")[0] != module]

    def _missing(self) -> None:
        """What BASE has and TUNED has not: nothing but buffers, and a head that another one took the place of."""
        tops = HEAD_TOPS - {name.partition(".")[0] for name in self._after}
        for name in self._before:
            wanted = name.endswith(".weight") and not is_head(name) and name.partition(".")[0] not in tops
            if name not in self._after and wanted and self._options.selects(name.rpartition(".")[0]):
                self._found.faults.append(Fault(name, "is in BASE and not in TUNED"))

    def _close(self) -> None:
        """Save what PEFT takes for a part of modules_to_save, whose names match ends of names, without a dot."""
        while modules := self._caught():
            for module in modules:
                self._save_module(module)

    def _caught(self) -> set[str]:
        adapted = {pair.name.rpartition(".")[0] for pair in self._found.pairs}
        saved = {name.rpartition(".")[0] for name in self._found.whole} - adapted
        every = {name.rpartition(".")[0] for name in self._after}
        return {
            module
            for module in every
            - {name.rpartition(".")[0] for name in self._found.whole if name.rpartition(".")[0] in saved}
            if any(module.endswith(name) for name in saved)
        }


def is_table(name: str) -> bool:
    """Whether a weight is an embedding's."""
    return is_embedding(name) or name.rpartition(".")[0].rpartition(".")[2] in TABLES


def short_names(targets: Collection[str], names: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Modules by the last part of their names where all of that part are meant, else by their whole names."""
    kinds = {name.rpartition(".")[0] for name in names if len(names[name].shape) > 1}
    for target in targets:
        leaf = target.rpartition(".")[2]
        alike = {module for module in kinds if f".{module}".endswith(f".{leaf}")}
        yield leaf if alike <= set(targets) else target
