"""Sort the tensors in which a base and a fine-tuned checkpoint differ: fitted, saved whole, or left out.

Names are the model's: checkpoints saved without their head (GPT-2's on the Hub) get the prefix of the whole
model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from ..errors import Fault
from ..naming.families import EXPERT_LAYERS, HEAD_TOPS, TABLES
from ..naming.resolve import find_tie, is_embedding, is_head
from ..plan.plan import Options
from ..plan.shapes import is_conv1d
from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import FLOATS, StoredTensor
from .jobs import HELD, Job
from .model_weights import JoinedWeight, ModelWeights, WeightPiece, model_weights


@dataclass(frozen=True)
class Pair(Job):
    """One weight of the running model before and after fine-tuning."""

    before: JoinedWeight
    after: JoinedWeight
    embedding: bool = False

    @property
    def experts(self) -> int:
        """The number of experts; 0 if the weight is no stack."""
        return self.before.experts

    @property
    def matrix(self) -> tuple[int, int]:
        """The outputs and inputs of the weight, or of one expert's."""
        sizes = self.before.sizes[0]
        return sum(rows for rows, _ in sizes), sizes[0][1]


class Differences:
    """The tensors that differ, by their fate; all tensors if `differing` is None."""

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
        rank: int | None = None,
    ) -> None:
        """`rank` is the rank of all factors, if the caller says so."""
        self.pairs: list[Pair] = []
        self.whole: dict[str, StoredTensor] = {}
        """Tensors saved as TUNED has them, by name."""
        self.skipped: list[str] = []
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self.keeps_ties = False
        self._types = base.model_types | tuned.model_types
        self.before, self.after = model_weights(base), model_weights(tuned)
        self._before, self._after = self.before.single, self.after.single
        self._kind, self._rank = kind, rank
        self._differing, self._options, self._embeddings = differing, options, embeddings
        self._held = HELD[kind] * (4 if single else 8)
        tie = find_tie(tuned)
        renamed = self.after.renamed
        self._stacks = {name.rpartition(".")[0] for name, each in self.after.joined.items() if each.experts}
        """Modules that own stacks of experts: all that is in them are parameters."""
        self._tie = tie and replace(tie, embedding=renamed(tie.embedding), head=renamed(tie.head))
        self._sort()

    def _sort(self) -> None:
        """Decide the fate of each tensor; factors come first, because they decide how a bias is saved."""
        names = [name for name in self._after if self._concerns(name)]
        for name in [name for name in names if not self._factored(name)]:
            self._rest(name)
        for name in self.after.joined:
            self._join(name)
        self._missing()
        # PEFT matches modules_to_save with the ends of names: modules that it also finds are saved, too.
        while modules := self._caught():
            for module in modules:
                self._save_module(module)

    def _concerns(self, name: str) -> bool:
        """Return True if a tensor may differ and is not left out by name."""
        if not self._options.selects(name.rpartition(".")[0]):
            return False
        return self._differing is None or name in self._differing or name not in self._before

    def _factored(self, name: str) -> bool:
        """Enter a tensor that gets factors; return True if it was entered."""
        after, before = self._after[name], self._before.get(name)
        table = is_table(name)
        is_parameter = name.rpartition(".")[0] in self._stacks
        if not (name.endswith(".weight") or is_parameter) or len(after.shape) != 2 or before is None:
            return False
        if (table or is_head(name)) and (self._embeddings != "lora" or before.shape != after.shape):
            return False
        if before.shape != after.shape or not {before.dtype, after.dtype} <= set(FLOATS):
            return False
        if self._is_tied(name) and not self._refused(name):
            why = "is tied to its head: PEFT merges factors of such an embedding wrongly"
            self.faults.append(Fault(name, f"{why}; --embeddings full or skip"))
        if self._is_tied(name):
            return True
        turned = table or is_conv1d(name, self._types)
        one, other = (JoinedWeight(((WeightPiece(tensor, turned),),)) for tensor in (before, after))
        self._pair(name, one, other, embedding=table)
        return True

    def _pair(self, name: str, before: JoinedWeight, after: JoinedWeight, *, embedding: bool = False) -> None:
        """Enter a weight that gets factors."""
        inputs = tuple(piece.tensor for weight in (before, after) for piece in weight.pieces)
        pair = Pair(name, inputs, 0, before=before, after=after, embedding=embedding)
        rows, columns = pair.matrix
        factors = 8 * pair.experts * min(self._rank or rows, rows, columns) * (rows + columns)
        self.pairs.append(replace(pair, cost=self._held * rows * columns + factors + (16 << 20)))

    def _join(self, name: str) -> None:
        """Enter a weight that is not one stored matrix; it gets factors, if anything."""
        after, before = self.after.joined[name], self.before.joined.get(name)
        if not self._options.selects(name.rpartition(".")[0]):
            return
        if before and self._differing is not None and not any(key in self._differing for key in keys_of(name, after)):
            return
        if before is None or before.sizes != after.sizes:
            self.faults.append(Fault(name, f"is made of {_title(after)} in TUNED, and of other tensors in BASE"))
        elif any(len(piece.tensor.shape) < 2 or piece.tensor.dtype not in FLOATS for piece in after.pieces):
            why = f"is made of {_title(after)}, which differ: an adapter would have to hold it whole"
            self.faults.append(Fault(name, f"{why}; --exclude leaves it out"))
        elif after.experts and self._kind == "dora":
            self.faults.append(Fault(name, "is a stack of experts: PEFT has no DoRA for it; --kind lora, or --exclude"))
        else:
            self._pair(name, before, after)

    def _rest(self, name: str) -> None:
        """Enter a tensor without factors: saved whole with its module, or left out."""
        after, before = self._after[name], self._before.get(name)
        resized = before is not None and before.shape != after.shape
        table = is_table(name) or is_head(name)
        if resized and not table:
            assert before
            self.faults.append(Fault(name, f"is {after.shape} in TUNED and {before.shape} in BASE"))
        elif self._embeddings == "skip" and before is not None:
            if resized:
                why = f"has {after.shape[0]} rows in TUNED: its new tokens cannot be left out"
                self.faults.append(Fault(name, f"{why}; --embeddings full"))
            self.skipped.append(name)
        else:
            if resized and self._embeddings == "lora":
                self.notes.append(f"{name} is saved whole: it has another number of rows than BASE's")
            self._save(name)

    def _save(self, name: str) -> None:
        """Enter a tensor to be saved whole, and what must be saved with it."""
        module, _, leaf = name.rpartition(".")
        parts = [other for other in self._after if other.startswith(f"{module}.")]
        inside = next((other for other in parts if "." in other[len(module) + 1 :]), "")
        adapted = any(pair.name == f"{module}.weight" for pair in self.pairs)
        if leaf == "bias" and (adapted or inside):
            self.whole[name] = self._after[name]  # a bias may come alone
        elif self._refused(name):
            pass
        elif inside:
            why = f"belongs to a module that has others inside, such as {inside}: no adapter holds it"
            self.faults.append(Fault(name, f"{why}; --embeddings skip leaves it out"))
        else:
            self._save_module(module)
            if self._tie and self._is_tied(name) and not self._tie.stored:
                self.keeps_ties = True
                self.whole[self._tie.head] = self._after[name]
                head = self._tie.head.rpartition(".")[0]
                if bias := self._after.get(f"{head.rpartition('.')[0]}.bias"):  # BERT's is the decoder's, too
                    self.whole[f"{head}.bias"] = bias

    def parameters(self) -> frozenset[str]:
        """Return the weights that PEFT finds as parameters only: stacks of experts, and in such models routers.

        There PEFT takes the names of dense layers for those of experts, so they are parameters, too.
        """
        stacks = {pair.name for pair in self.pairs if pair.name.rpartition(".")[0] in self._stacks}
        if not self._stacks:
            return frozenset()
        leaves = (name for name in self._after if name.rpartition(".")[0].rpartition(".")[2] in EXPERT_LAYERS)
        return frozenset({*stacks, *(leaves if self._kind == "lora" else ())})

    def _is_tied(self, name: str) -> bool:
        """Return True for a tied embedding and its head."""
        return self._tie is not None and name in (self._tie.embedding, self._tie.head)

    def _refused(self, name: str) -> bool:
        """Enter a fault for a tensor tied in a way that no adapter holds; return True if one was entered."""
        if not (self._tie and self._tie.refusal and self._is_tied(name)):
            return False
        self.faults.append(Fault(name, f"{self._tie.refusal}; --embeddings skip leaves it out"))
        return True

    def _save_module(self, module: str) -> None:
        """Enter all tensors of a module to be saved whole, and none as factors."""
        self.whole |= {n: x for n, x in self._after.items() if n.rpartition(".")[0] == module}
        self.pairs = [pair for pair in self.pairs if pair.name.rpartition(".")[0] != module]

    def _missing(self) -> None:
        """Enter a fault for each weight that only BASE has; buffers and replaced heads may be missing."""
        tops = HEAD_TOPS - {name.partition(".")[0] for name in self._after}
        for name in sorted({*self.before.names} - {*self.after.names}):
            weight = name.endswith(".weight") or name in self.before.joined
            wanted = weight and not is_head(name) and name.partition(".")[0] not in tops
            if wanted and self._options.selects(name.rpartition(".")[0]):
                self.faults.append(Fault(name, "is in BASE and not in TUNED"))

    def _caught(self) -> set[str]:
        """Return the modules that PEFT would save by mistake."""
        saved = _modules(self.whole) - _modules(pair.name for pair in self.pairs)
        others = _modules(self._after) - saved
        return {module for module in others if any(module.endswith(name) for name in saved)}


def keys_of(name: str, weight: JoinedWeight) -> list[str]:
    """Return a key for each piece of a weight that is not one stored matrix."""
    return [f"{name} {number}" for number, _ in enumerate(weight.pieces)]


def both_of(before: ModelWeights, after: ModelWeights) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Return everything that two checkpoints can be compared by: weights, and pieces of joined weights, by key."""
    both = {name: (before.single[name], tensor) for name, tensor in after.single.items() if name in before.single}
    for name, weight in after.joined.items():
        if (old := before.joined.get(name)) and old.sizes == weight.sizes:
            pairs = zip(old.pieces, weight.pieces, strict=True)
            both |= {key: (b.tensor, a.tensor) for key, (b, a) in zip(keys_of(name, weight), pairs, strict=True)}
    return both


def _title(weight: JoinedWeight) -> str:
    names = list(dict.fromkeys(piece.tensor.name for piece in weight.pieces))
    return ", ".join(names[:3]) + (" …" if names[3:] else "")


def _modules(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def is_table(name: str) -> bool:
    """Return True for the weight of an embedding."""
    return is_embedding(name) or name.rpartition(".")[0].rpartition(".")[2] in TABLES


def short_names(targets: Collection[str], names: Iterable[str]) -> Iterator[str]:
    """Yield modules by the last part of their names if all such modules are targets, else by whole names.

    Modules that hold others count, too: PEFT would find them by the same last part.
    """
    ends: dict[str, set[str]] = {}
    for module in _modules(names):
        parts = module.split(".")
        for number, part in enumerate(parts, 1):
            ends.setdefault(part, set()).add(".".join(parts[:number]))
    chosen = set(targets)
    for target in targets:
        leaf = target.rpartition(".")[2]
        yield leaf if ends.get(leaf, set()) <= chosen else target
