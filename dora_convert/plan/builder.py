"""A plan while adapters are being added to it: every output tensor, and what has been decided of it so far."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

from ..adapters.adapter import Adapter, Change
from ..adapters.updates import Decomposed, Delta, Full, LowRank, Rows, Update, low_rank, tensors_of
from ..errors import Fault
from ..naming.resolve import NameResolver, explain_missing
from ..naming.ties import Tie, find_tie, is_embedding, is_head
from ..storage.checkpoint import Checkpoint
from ..storage.reader import same_bytes
from ..storage.safetensors import FLOATS, StoredTensor
from .item import Edit, Item
from .options import Options
from .plan import Entry
from .shapes import Match, Mismatch, fit


@dataclass
class Target:
    """One tensor of the output."""

    source: StoredTensor
    base: StoredTensor | None
    added: bool = False
    rows: list[Rows] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)

    @property
    def touched(self) -> bool:
        """Whether an adapter has a part in it."""
        return bool(self.source is not self.base or self.rows or self.edits)


@dataclass(frozen=True)
class TiedChange:
    """A change to one side of a tie, or to both, kept until all adapters are known."""

    change: Change
    sides: tuple[str, ...]
    weight: float


class PlanBuilder:
    """Collects what adapters do to the tensors of a base, and everything that does not fit."""

    def __init__(self, base: Checkpoint, tasks: Collection[str], options: Options) -> None:
        self.base, self.options = base, options
        self.targets: dict[str, Target] = {}
        seen: set[str] = set()
        for name, tensor in base.tensors.items():
            self.targets[name] = Target(tensor, tensor, added=base.stored_name(name) in seen)
            seen.add(base.stored_name(name))
        self.tie: Tie | None = find_tie(base, tasks)
        self.untied = False
        self.ledger: list[Entry] = []
        self.faults: list[Fault] = []
        self._touches: list[TiedChange] = []
        self._modules = {name.rpartition(".")[0] for name in base.tensors}

    def add(
        self, adapter: Adapter, names: NameResolver, weight: float, chosen: Callable[[Change], bool]
    ) -> None:
        """Place every change of an adapter; what it replaces comes before what it adds."""
        self.ledger += [Entry(name, "ignored", (), why) for name, why in adapter.ignored.items()]
        self.faults += adapter.faults
        for change in sorted(self._told_apart(adapter.changes, names), key=_turn):
            if not chosen(change):
                self._enter(change.update, "ignored", (), "left out by name")
                continue
            name = names.find(change.target)
            if self.tie and (name in (self.tie.embedding, self.tie.head) or is_head(change.target)):
                self._touch(change, name, adapter, weight)
            elif adapter.layers and (refusal := _begins_elsewhere(change.update)):
                self._fault(change.update, refusal)
            elif name:
                self._apply(change.update, name, weight)
            elif isinstance(change.update, Full) and change.update.may_add and self._is_new(change.target):
                self._add(change.update, change.target, weight)
            elif self.options.allow_unmatched:
                why = explain_missing(change.target, names, self.base)
                self._enter(change.update, "unmatched", (), why)
            else:
                self._fault(change.update, explain_missing(change.target, names, self.base))

    def _add(self, update: Full, name: str, weight: float) -> None:
        if weight != 1:
            self._fault(update, f"adds {name}, which has no weight of {weight:g}")
        self.targets[name] = Target(update.value, None, added=True)
        self._enter(update, "added", (name,), "the base has no such module")

    def _told_apart(self, changes: Sequence[Change], names: NameResolver) -> Iterator[Change]:
        """Changes with their targets; those of one module that only shapes can tell apart get the one way that fits."""
        groups: dict[tuple[str, ...], list[Change]] = {}
        for change in changes:
            if change.among:
                groups.setdefault(change.among, []).append(change)
            else:
                yield change
        for targets, group in groups.items():
            ways = [
                [replace(change, target=target, among=()) for change, target in zip(group, way, strict=True)]
                for way in permutations(targets)
            ]
            fitting = [way for way in ways if all(self._fits(change, names) for change in way)]
            if len(fitting) == 1:
                yield from fitting[0]
            else:
                for change in group:
                    self._fault(change.update, f"may be for any of {', '.join(targets)}: shapes do not tell")

    def _fits(self, change: Change, names: NameResolver) -> bool:
        name = names.find(change.target)
        tensor = name and self.targets[name].source
        return bool(
            name
            and tensor
            and isinstance(fit(change.update, name, tensor.shape, tensor.dtype, self.base.model_types), Match)
        )

    def _is_new(self, target: str) -> bool:
        return target not in self.targets and target.rpartition(".")[0] not in self._modules

    def _touch(self, change: Change, name: str | None, adapter: Adapter, weight: float) -> None:
        """Decide which sides of the tie a change is for."""
        assert self.tie
        if refusal := self.tie.refusal or _begins_elsewhere(change.update):
            self._fault(change.update, refusal)
            return
        both: tuple[str, ...] = (self.tie.embedding, self.tie.head)
        side = self.tie.embedding if name == self.tie.embedding else self.tie.head
        sides = both
        other = next((c for c in adapter.changes if _same_kind(c, change) and self._across(c, side)), None)
        if adapter.keeps_ties or self._is_copy(change.update, other):
            if side == self.tie.head and other:
                self._enter(change.update, "ignored", (), f"the same as for {self.tie.embedding}, its tie")
                return
        elif not self._means_both(change.update, side, other):
            sides = (side,)
        self._touches.append(TiedChange(change, sides, weight))

    def _across(self, change: Change, side: str) -> bool:
        """Whether a change is for the other side of the tie."""
        wanted = is_head if self.tie and side == self.tie.embedding else is_embedding
        return wanted(change.target)

    def _is_copy(self, update: Update, other: Change | None) -> bool:
        """Whether an adapter brings the same tensor for both sides."""
        return (
            isinstance(update, Full)
            and other is not None
            and isinstance(other.update, Full)
            and same_bytes(update.value, other.update.value)
        )

    def _means_both(self, update: Update, side: str, other: Change | None) -> bool:
        """Whether a change of one side is one of both: new tokens are, and another number of them."""
        assert self.tie
        if isinstance(update, Rows):
            return side == self.tie.embedding
        rows = self.targets[self.tie.embedding].source.shape[0]
        return isinstance(update, Full) and not other and update.value.shape[:1] != (rows,)

    def settle_ties(self) -> None:
        """Apply what was kept: to one weight as long as both sides do the same, else to two."""
        if not self._touches or not self.tie:
            return
        embedding, head = self.tie.embedding, self.tie.head
        self.untied = any(len(touch.sides) == 1 for touch in self._touches)
        if self.untied and not self.tie.stored:
            source = self.targets[embedding].source
            self.targets[head] = Target(source, source, added=True)
        for touch in self._touches:
            sides = [side for side in touch.sides if side in self.targets]
            for side in sides:
                self._apply(
                    touch.change.update, side, touch.weight, enter=side == sides[0], into=tuple(sides)
                )

    def _apply(
        self, update: Update, name: str, weight: float, *, enter: bool = True, into: tuple[str, ...] = ()
    ) -> None:
        """Put an update where it belongs, or record why it does not fit."""
        target = self.targets[name]
        shape = self._new_shape(update, name)
        match fit(update, name, shape, target.source.dtype, self.base.model_types):
            case Mismatch(why):
                self._fault(update, why)
            case Match(Full() as full):
                self._replace(full, name, weight)
            case Match(Rows() as rows):
                self._set_rows(rows, name, weight)
            case Match(LowRank() | Decomposed() | Delta() as edit, transposed):
                target.edits.append(Edit(edit, transposed, weight))
        if enter:
            fate = "replaced" if isinstance(update, (Full, Rows)) else "merged"
            self._enter(update, fate, into or (name,), describe(update))

    def _new_shape(self, update: Update, name: str) -> tuple[int, ...]:
        """The shape a tensor must have for an update: only an embedding or a head may come with other rows."""
        shape = self.targets[name].source.shape
        if isinstance(update, Full) and (is_embedding(name) or is_head(name)):
            return (*update.value.shape[:1], *shape[1:])
        return shape

    def _replace(self, update: Full, name: str, weight: float) -> None:
        target = self.targets[name]
        once_more = _from_one_file(target.source, update.value)
        if once_more and same_bytes(target.source, update.value):
            return  # one weight saved under two names
        if target.source is not target.base:
            self._fault(
                update, f"{'it' if once_more else 'another adapter'} replaces {name}, too, with other values"
            )
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
        self.faults += [Fault(tensor.name, why) for tensor in tensors_of(update)]

    def items(self) -> dict[str, Item]:
        """Every output tensor."""
        return {name: self._item(name, target) for name, target in self.targets.items()}

    def _item(self, name: str, target: Target) -> Item:
        shape, wanted = target.source.shape, self.options.dtype
        dtype = (target.base or target.source).dtype
        dtype = wanted if wanted and dtype in FLOATS else dtype
        base = target.base and _stacked(target.base, target.edits)
        source = base if target.source is target.base and base else _stacked(target.source, target.edits)
        origin = self.base.stored_name(base.name) if base else name
        rows, edits = tuple(target.rows), tuple(target.edits)
        item = Item(name, dtype, shape, source, base, rows, edits, target.added, origin)
        if item.start and (len(item.edits) > 1 or item.edits[0].weight != 1):
            self._fault(item.start, f"began training with another {name}: it is merged alone and at weight 1")
        return item


def _turn(change: Change) -> int:
    """What is replaced comes before what is added to it."""
    return 0 if isinstance(change.update, Full) else 1 if isinstance(change.update, Rows) else 2


def _begins_elsewhere(update: Update) -> str | None:
    """Why an update of one side of a tie, or of one of several copies, cannot be merged."""
    if isinstance(update, LowRank | Decomposed):
        update = low_rank(update)
    if isinstance(update, LowRank | Full) and (start := update.start):
        return f"{start.value} changed a weight that serves twice: what training began with is not known"
    return None


def _from_one_file(one: StoredTensor, other: StoredTensor) -> bool:
    return one.path == other.path


def _stacked(tensor: StoredTensor, edits: Sequence[Edit]) -> StoredTensor:
    """Experts that are edited as one matrix, one below the other."""
    if not any(edit.low and edit.low.experts for edit in edits):
        return tensor
    count, rows, columns = tensor.shape
    return replace(tensor, shape=(count * rows, columns))


def _same_kind(change: Change, other: Change) -> bool:
    return _turn(change) == _turn(other)


def describe(update: Update) -> str:
    """What an update is, in a few words."""
    match update:
        case Full():
            return "saved whole by the adapter"
        case Rows(_, index):
            return f"{len(index)} trained rows"
        case Delta(_, scale):
            return f"LoRA's bias, scaling {scale:g}"
        case LowRank() | Decomposed():
            low = low_rank(update)
            kind = "DoRA" if isinstance(update, Decomposed) else low.start.value if low.start else "LoRA"
            return f"{kind}, rank {low.rank}, scaling {low.scale:g}"
