"""Collect the updates of adapters on the tensors of a base, while a plan is being made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

from ..adapters.adapter import Adapter, Change, Decomposed, Delta, Full, LowRank, Rows, Update, low_rank, tensors_of
from ..errors import Fault
from ..naming.resolve import NameResolver, explain_missing
from ..naming.ties import Tie, is_embedding, is_head
from ..storage.checkpoint import Checkpoint
from ..storage.reader import same_bytes
from ..storage.safetensors import FLOATS, StoredTensor
from .item import Edit, Item
from .options import Options
from .plan import Entry
from .shapes import Match, Mismatch, match_shape


@dataclass
class TargetTensor:
    """One tensor of the output, as far as it has been decided."""

    source: StoredTensor
    base: StoredTensor | None
    added: bool = False
    rows: list[Rows] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)

    @property
    def touched(self) -> bool:
        """True if an adapter changes the tensor."""
        return bool(self.source is not self.base or self.rows or self.edits)


@dataclass(frozen=True)
class TiedChange:
    """A change to one side of a tie, or to both, kept until all adapters are known."""

    change: Change
    sides: tuple[str, ...]
    weight: float


class PlanBuilder:
    """Collects what adapters do to the tensors of a base, and every fault."""

    def __init__(self, base: Checkpoint, tie: Tie | None, options: Options) -> None:
        self.base, self.tie, self.options = base, tie, options
        self.targets: dict[str, TargetTensor] = {}
        seen: set[str] = set()
        for name, tensor in base.tensors.items():
            self.targets[name] = TargetTensor(tensor, tensor, added=base.stored_name(name) in seen)
            seen.add(base.stored_name(name))
        self.untied = False
        self.ledger: list[Entry] = []
        self.faults: list[Fault] = []
        self.beside: dict[str, list[Full]] = {}
        """The updates at fault that come from files beside the adapters, by file."""
        self._tied_changes: list[TiedChange] = []
        self._modules = {name.rpartition(".")[0] for name in base.tensors}

    def add(self, adapter: Adapter, names: NameResolver, weight: float) -> None:
        """Apply every change of an adapter; replacements come before additions."""
        self.ledger += [Entry(name, "ignored", (), why) for name, why in adapter.ignored.items()]
        self.faults += adapter.faults
        for change in sorted(self._told_apart(adapter.changes, names), key=_turn):
            if self.options.selects(change.module):
                self._add_change(change, adapter, names, weight)
            else:
                self._enter(change.update, "ignored", (), "left out by name")

    def _add_change(self, change: Change, adapter: Adapter, names: NameResolver, weight: float) -> None:
        """Apply one change, keep it until all adapters are known, or note why it cannot be applied."""
        update, name = change.update, names.find(change.target)
        if self.tie and (name in (self.tie.embedding, self.tie.head) or is_head(change.target)):
            self._keep_tied(change, name, adapter, weight)
        elif adapter.layers and (refusal := _begins_elsewhere(update)):
            self._fault(update, refusal)
        elif name:
            self._apply(update, name, weight)
        elif isinstance(update, Full) and update.may_add and self._is_new(change):
            self._add_tensor(update, change.target, weight)
        elif self.options.allow_unmatched:
            self._enter(update, "unmatched", (), explain_missing(change.target, names, self.base))
        else:
            self._fault(update, explain_missing(change.target, names, self.base))

    def _is_new(self, change: Change) -> bool:
        return change.target not in self.targets and change.module not in self._modules

    def _add_tensor(self, update: Full, name: str, weight: float) -> None:
        if weight != 1:
            self._fault(update, f"adds {name}, which has no weight of {weight:g}")
        self.targets[name] = TargetTensor(update.value, None, added=True)
        self._enter(update, "added", (name,), "the base has no such module")

    def _told_apart(self, changes: Sequence[Change], names: NameResolver) -> Iterator[Change]:
        """Yield every change with one target.

        Some changes of one module can only be told apart by shapes. They get the one assignment that fits.
        """
        groups: dict[tuple[str, ...], list[Change]] = {}
        for change in changes:
            if change.among:
                groups.setdefault(change.among, []).append(change)
            else:
                yield change
        for targets, group in groups.items():
            assignments = [
                [replace(change, target=target, among=()) for change, target in zip(group, order, strict=True)]
                for order in permutations(targets)
            ]
            fitting = [changes for changes in assignments if all(self._fits(each, names) for each in changes)]
            if len(fitting) == 1:
                yield from fitting[0]
            else:
                for change in group:
                    self._fault(change.update, f"may be for any of {', '.join(targets)}: shapes do not tell")

    def _fits(self, change: Change, names: NameResolver) -> bool:
        if not (name := names.find(change.target)):
            return False
        tensor, types = self.targets[name].source, self.base.model_types
        return isinstance(match_shape(change.update, name, tensor.shape, tensor.dtype, types), Match)

    def _keep_tied(self, change: Change, name: str | None, adapter: Adapter, weight: float) -> None:
        """Decide which sides of the tie a change is for, and keep the change."""
        assert self.tie
        embedding, head = self.tie.embedding, self.tie.head
        if refusal := self.tie.refusal or _begins_elsewhere(change.update):
            self._fault(change.update, refusal)
            return
        on_embedding = name == embedding
        is_other_side = is_head if on_embedding else is_embedding
        others = (c for c in adapter.changes if _turn(c) == _turn(change) and is_other_side(c.target))
        other = next(others, None)
        sides: tuple[str, ...] = (embedding, head)
        if adapter.keeps_ties or (other and _is_copy(change.update, other.update)):
            if other and not on_embedding:
                self._enter(change.update, "ignored", (), f"the same as for {embedding}, its tie")
                return
        elif not self._means_both(change.update, other, on_embedding=on_embedding):
            sides = (embedding if on_embedding else head,)
        self._tied_changes.append(TiedChange(change, sides, weight))

    def _means_both(self, update: Update, other: Change | None, *, on_embedding: bool) -> bool:
        """Return True if a change of one side is meant for both: new tokens, and another number of tokens."""
        assert self.tie
        if isinstance(update, Rows):
            return on_embedding
        rows = self.targets[self.tie.embedding].source.shape[0]
        return isinstance(update, Full) and not other and update.value.shape[:1] != (rows,)

    def settle_ties(self) -> None:
        """Apply the kept changes: to one weight if both sides change alike, else to two weights."""
        if not self._tied_changes or not self.tie:
            return
        self.untied = any(len(tied.sides) == 1 for tied in self._tied_changes)
        if self.untied and not self.tie.stored:
            source = self.targets[self.tie.embedding].source
            self.targets[self.tie.head] = TargetTensor(source, source, added=True)
        for tied in self._tied_changes:
            sides = tuple(side for side in tied.sides if side in self.targets)
            for side in sides:
                self._apply(tied.change.update, side, tied.weight, into=sides)

    def _apply(self, update: Update, name: str, weight: float, into: tuple[str, ...] = ()) -> None:
        """Add an update to its tensor, or note why the update does not match."""
        target, shape = self.targets[name], self._new_shape(update, name)
        match match_shape(update, name, shape, target.source.dtype, self.base.model_types):
            case Mismatch(why):
                self._fault(update, why)
            case Match(Full() as full):
                self._replace(full, name, weight)
            case Match(Rows() as rows):
                self._set_rows(rows, name, weight)
            case Match(LowRank() | Decomposed() | Delta() as edit, transposed):
                target.edits.append(Edit(edit, transposed, weight))
        if name == (into or (name,))[0]:  # one entry for both sides of a tie
            fate = "replaced" if isinstance(update, (Full, Rows)) else "merged"
            self._enter(update, fate, into or (name,), describe(update))

    def _new_shape(self, update: Update, name: str) -> tuple[int, ...]:
        """Return the shape that an update must have: only an embedding or a head may have other rows."""
        shape = self.targets[name].source.shape
        if isinstance(update, Full) and (is_embedding(name) or is_head(name)):
            return (*update.value.shape[:1], *shape[1:])
        return shape

    def _replace(self, update: Full, name: str, weight: float) -> None:
        target = self.targets[name]
        from_one_folder = target.source.path.parent == update.value.path.parent
        if from_one_folder and same_bytes(target.source, update.value):
            return  # one weight saved under two names, or in two files
        if target.source is not target.base:
            culprit = "it" if from_one_folder else "another adapter"
            self._fault(update, f"{culprit} replaces {name}, too, with other values")
        if weight != 1:
            self._fault(update, f"replaces {name}, which has no weight of {weight:g}")
        target.source = update.value

    def _set_rows(self, update: Rows, name: str, weight: float) -> None:
        taken = {row for rows in self.targets[name].rows for row in rows.index}
        if shared := sorted(taken.intersection(update.index)):
            self._fault(update, f"another adapter replaces row {shared[0]} of {name}, too")
        if weight != 1:
            self._fault(update, f"replaces rows of {name}, which have no weight of {weight:g}")
        self.targets[name].rows.append(update)

    def _enter(self, update: Update, fate: str, into: tuple[str, ...], why: str) -> None:
        self.ledger += [Entry(tensor.name, fate, into, why) for tensor in tensors_of(update)]

    def _fault(self, update: Update, why: str) -> None:
        if isinstance(update, Full) and update.file:
            why = f"in {update.file}; {why}"
            self.beside.setdefault(update.file, []).append(update)
        self.faults += [Fault(tensor.name, why) for tensor in tensors_of(update)]

    def items(self) -> dict[str, Item]:
        """Return every output tensor by name."""
        return {name: self._item(name, target) for name, target in self.targets.items()}

    def _item(self, name: str, target: TargetTensor) -> Item:
        dtype = (target.base or target.source).dtype
        base = target.base and _stacked(target.base, target.edits)
        item = Item(
            name=name,
            dtype=self.options.dtype if self.options.dtype and dtype in FLOATS else dtype,
            shape=target.source.shape,
            source=base if target.source is target.base and base else _stacked(target.source, target.edits),
            base=base,
            rows=tuple(target.rows),
            edits=tuple(target.edits),
            added=target.added,
            origin=self.base.stored_name(base.name) if base else name,
        )
        if item.edits and item.start and (len(item.edits) > 1 or item.edits[0].weight != 1):
            self._fault(item.start, f"began training with another {name}: it is merged alone and at weight 1")
        return item


def _turn(change: Change) -> int:
    """Return a sort key that puts replacements before additions."""
    return 0 if isinstance(change.update, Full) else 1 if isinstance(change.update, Rows) else 2


def _begins_elsewhere(update: Update) -> str | None:
    """Return why an update to a weight that serves twice cannot be merged; None if it can."""
    if isinstance(update, LowRank | Decomposed):
        update = low_rank(update)
    if isinstance(update, LowRank | Full) and (start := update.start):
        return f"{start.value} changed a weight that serves twice: what training began with is not known"
    return None


def _is_copy(one: Update, other: Update) -> bool:
    """Return True if an adapter brings the same tensor for both sides of a tie."""
    return isinstance(one, Full) and isinstance(other, Full) and same_bytes(one.value, other.value)


def _stacked(tensor: StoredTensor, edits: Sequence[Edit]) -> StoredTensor:
    """Return edited experts as one matrix, one below the other; any other tensor as it is."""
    if not any(edit.low and edit.low.experts for edit in edits):
        return tensor
    count, rows, columns = tensor.shape
    return replace(tensor, shape=(count * rows, columns))


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
