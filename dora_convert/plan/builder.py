"""Collect the updates of adapters on the tensors of a base, while a plan is being made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

from ..adapters import Adapter, Change, Decomposed, Delta, Full, Rows, Transform, Update, low_rank, tensors_of
from ..errors import Fault
from ..naming.resolve import NameResolver, Tie, explain_missing, is_embedding, is_head
from ..storage.checkpoint import Checkpoint
from ..storage.reader import same_bytes
from ..storage.safetensors import FLOATS, StoredTensor
from .item import Edit, Item
from .plan import Entry, Options
from .shapes import Match, match_shape


@dataclass
class TargetTensor:
    """One tensor of the output, as far as it has been decided."""

    source: StoredTensor
    base: StoredTensor | None
    added: bool = False
    rows: list[Rows] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, with the rows that adapters add below those of `source`."""
        new = [1 + max(rows.index, default=-1) for rows in self.rows]
        return (max(self.source.shape[0], *new), *self.source.shape[1:]) if new else self.source.shape


class PlanBuilder:
    """Collects what adapters do to the tensors of a base, and every fault."""

    def __init__(self, base: Checkpoint, tie: Tie | None, options: Options) -> None:
        self.base, self.tie, self.options = base, tie, options
        first = {base.stored_name(name): name for name in reversed(list(base.tensors))}
        self.targets = {
            name: TargetTensor(tensor, tensor, added=first[base.stored_name(name)] != name)
            for name, tensor in base.tensors.items()
        }
        self.untied = False
        self.warnings: list[str] = []
        self.ledger: list[Entry] = []
        self.faults: list[Fault] = []
        self.beside: dict[str, list[Full]] = {}
        """The updates at fault that come from files beside the adapters, by file."""
        self._tied_changes: list[tuple[Change, tuple[str, ...], float]] = []
        """Changes to one side of the tie, or to both, and their weights; kept until all adapters are known."""
        self._claimed: set[str] = set()  # by deltas of the adapter at hand
        self._names = {*base.tensors, *(name.rpartition(".")[0] for name in base.tensors)}

    def add(self, adapter: Adapter, names: NameResolver, weight: float) -> None:
        """Apply every change of an adapter; replacements come before additions."""
        self.ledger += [Entry(name, "ignored", (), why) for name, why in adapter.ignored.items()]
        self.faults += adapter.faults
        self._claimed.clear()
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
        elif name and _turn(change) == 2 and name in self._claimed:
            self._fault(update, f"changes {name}, which another tensor of the same adapter changes, too")
        elif name:
            self._claimed |= {name} if _turn(change) == 2 else set()
            self._apply(update, name, weight)
        elif isinstance(update, Full) and update.may_add and not {change.module, change.target} & self._names:
            self.targets[change.target] = TargetTensor(update.value, None, added=True)
            self._names.add(change.target)
            if weight != 1:
                self._fault(update, f"adds {change.target}, which has no weight of {weight:g}")
            self._enter(update, "added", (change.target,), "the base has no such module")
        else:
            why = explain_missing(change.target, names, self.base)
            if self.options.allow_unmatched:
                self._enter(update, "unmatched", (), why)
            else:
                self._fault(update, why)

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
            fitting = [
                [replace(change, target=target, among=()) for change, target in zip(group, order, strict=True)]
                for order in permutations(targets)
                if all(self._fits(change.update, names.find(name)) for change, name in zip(group, order, strict=True))
            ]
            if len(fitting) == 1:
                yield from fitting[0]
            else:
                for change in group:
                    self._fault(change.update, f"may be for any of {', '.join(targets)}: shapes do not tell")

    def _fits(self, update: Update, name: str | None) -> bool:
        return name is not None and isinstance(self._match(update, name, self.targets[name].source.shape), Match)

    def _match(self, update: Update, name: str, shape: tuple[int, ...]) -> Match | str:
        return match_shape(update, name, shape, self.targets[name].source.dtype, self.base.model_types)

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
        self._tied_changes.append((change, sides, weight))

    def _means_both(self, update: Update, other: Change | None, *, on_embedding: bool) -> bool:
        """Return True if a change of one side is meant for both: new tokens, and another number of tokens."""
        assert self.tie
        if isinstance(update, Rows):
            return on_embedding
        rows = self.targets[self.tie.embedding].source.shape[0]
        return isinstance(update, Full) and update.copied and not other and update.value.shape[:1] != (rows,)

    def settle_ties(self) -> None:
        """Apply the kept changes: to one weight if both sides change alike, else to two weights."""
        if not self._tied_changes or not self.tie:
            return
        self.untied = any(len(sides) == 1 for _, sides, _ in self._tied_changes)
        if self.untied and not self.tie.stored:
            source = self.targets[self.tie.embedding].source
            self.targets[self.tie.head] = TargetTensor(source, source, added=True)
        for change, sides, weight in self._tied_changes:
            into = tuple(side for side in sides if side in self.targets)
            for side in into:
                self._apply(change.update, side, weight, into)
        sides = (self.tie.embedding, self.tie.head)
        for name, other in (sides, sides[::-1]) if self.untied else ():
            self._resize(name, other)

    def _resize(self, name: str, other: str) -> None:
        """Give one side of a former tie as many rows as an adapter's tensor for the other side has.

        Its new rows are not in the adapter's file. They began as the other side's.
        """
        target, saved = self.targets[name], self.targets[other].source
        if target.source is not target.base or saved is self.targets[other].base:
            return
        if (new := saved.shape[0]) < (height := target.shape[0]):
            target.source = replace(target.source, shape=(new, *target.source.shape[1:]))
        elif new > height:
            start = saved.start + height * (saved.nbytes // new)
            tail = replace(saved, shape=(new - height, *saved.shape[1:]), start=start)
            target.rows.append(Rows(tail, tuple(range(height, new))))
            for k, entry in enumerate(self.ledger):
                if entry.tensor == saved.name and entry.into:
                    self.ledger[k] = replace(entry, into=(*entry.into, name))
            self.warnings.append(
                f"{new - height} new rows of {name} are in no file: "
                f"they are taken from the adapter's {other}, where they began"
            )

    def _apply(self, update: Update, name: str, weight: float, into: tuple[str, ...] = ()) -> None:
        """Add an update to its tensor, or note why the update does not match."""
        target = self.targets[name]
        shape = target.shape if isinstance(update, Rows) else target.source.shape
        if isinstance(update, Full) and (is_embedding(name) or is_head(name)):
            shape = (*update.value.shape[:1], *shape[1:])  # only an embedding or a head may have other rows
        match self._match(update, name, shape):
            case str(why):
                self._fault(update, why)
            case Match(Full() as full):
                self._replace(full, name, weight)
            case Match(Rows() as rows):
                self._set_rows(rows, name, weight)
            case Match(Transform() | Decomposed() | Delta() as edit, transposed, kernel):
                target.edits.append(Edit(edit, transposed, weight, kernel=kernel))
        if name == (into or (name,))[0]:  # one entry for both sides of a tie
            fate = "replaced" if isinstance(update, (Full, Rows)) else "merged"
            self._enter(update, fate, into or (name,), update.title)

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

    def item(self, name: str) -> Item:
        """Return an output tensor."""
        target = self.targets[name]
        dtype = (target.base or target.source).dtype
        base = target.base and _stacked(target.base, target.edits)
        item = Item(
            name=name,
            dtype=self.options.dtype if self.options.dtype and dtype in FLOATS else dtype,
            shape=target.shape,
            source=base if target.source is target.base and base else _stacked(target.source, target.edits),
            base=base,
            rows=tuple(target.rows),
            edits=tuple(target.edits),
            added=target.added,
            origin=self.base.stored_name(base.name) if base else name,
        )
        if item.edits and item.start and (len(item.edits) > 1 or item.edits[0].weight != 1):
            self._fault(item.start, f"began training with another {name}: it is merged alone and at weight 1")
        for edit in item.edits if item.grown else ():
            self._fault(edit.update, f"is for a {name} without the rows that another adapter adds")
        return item


def _turn(change: Change) -> int:
    """Return a sort key that puts replacements before additions."""
    return 0 if isinstance(change.update, Full) else 1 if isinstance(change.update, Rows) else 2


def _begins_elsewhere(update: Update) -> str | None:
    """Return why an update to a weight that serves twice cannot be merged; None if it can."""
    begun = update if isinstance(update, Full) else low_rank(update)
    if begun and (start := begun.start):
        return f"{start.value} changed a weight that serves twice: what training began with is not known"
    return None


def _is_copy(one: Update, other: Update) -> bool:
    """Return True if an adapter brings the same tensor for both sides of a tie."""
    match one, other:
        case Full(value), Full(copy):
            return same_bytes(value, copy)
        case Rows(value, index), Rows(copy, numbers):
            return index == numbers and same_bytes(value, copy)
    return False


def _stacked(tensor: StoredTensor, edits: Sequence[Edit]) -> StoredTensor:
    """Return edited experts as one matrix, one below the other; any other tensor as it is."""
    stacked = any(edit.low and edit.low.experts for edit in edits)
    return replace(tensor, shape=(tensor.numel // tensor.shape[2], tensor.shape[2])) if stacked else tensor
