"""Collect the updates of adapters on the tensors of a base, while a plan is being made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations, permutations
from typing import TYPE_CHECKING

from ..adapters import Adapter, Change, Decomposed, Delta, Full, Rows, Transform, Update
from ..errors import Fault
from ..naming.resolve import NameResolver, Tie, is_embedding, is_head
from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import FLOATS
from .item import Edit, Item
from .plan import Entry, Options
from .shapes import (
    ClaimedOutputs,
    Match,
    TargetTensor,
    begins_elsewhere,
    is_copy,
    match_shape,
    settle_widest,
    stacked,
    turn_of,
)

if TYPE_CHECKING:
    from ..naming.slots import Slot


class PlanBuilder:
    """Collects what adapters do to the tensors of a base, and every fault."""

    def __init__(self, base: Checkpoint, tie: Tie | None, options: Options) -> None:
        self.base, self.tie, self.options = base, tie, options
        first = {base.stored_name(name): name for name in reversed(list(base.tensors))} if base.renamed else {}
        self.targets = {
            name: TargetTensor(tensor, tensor, added=bool(first) and first[base.stored_name(name)] != name)
            for name, tensor in base.tensors.items()
        }
        self.untied = False
        self.warnings: list[str] = []
        self.ledger: list[Entry] = []
        self.faults: list[Fault] = []
        self.beside: dict[str, list[Full]] = {}
        """The updates at fault that come from files beside the adapters, by file."""
        self._tied_changes: list[tuple[Change, tuple[str, ...], float, int]] = []
        """Changes to one side of the tie, or to both, with weight and number of the adapter; kept until the end."""
        self._adapters: list[Adapter] = []
        self._combined: set[str] = set()  # tensors with an edit that is a tensor stored whole
        self._number = 0  # of the adapter at hand
        self._claimed = ClaimedOutputs()  # by additions of the adapter at hand

    @cached_property
    def _names(self) -> set[str]:
        """Every tensor, and every module that owns one, of the base and of what adapters add."""
        return {*self.targets, *(name.rpartition(".")[0] for name in self.base.tensors)}

    def add(self, adapter: Adapter, names: NameResolver, weight: float) -> None:
        """Apply every change of an adapter; replacements come before additions."""
        self.ledger += [Entry(name, "ignored", (), why) for name, why in adapter.ignored.items()]
        self.faults, self.warnings = [*self.faults, *adapter.faults], [*self.warnings, *adapter.warnings]
        self._claimed, self._number = ClaimedOutputs(), len(self._adapters)
        self._adapters.append(adapter)
        selective = self.options.selective
        for change in sorted(self._told_apart(adapter.changes, names), key=turn_of):
            if not selective or self.options.selects(change.module):
                self._add_change(change, adapter, names, weight)
            else:
                self._enter(change.update, "ignored", (), "left out by name")
        settle_widest(self.targets, adapter.changes)

    def _add_change(self, change: Change, adapter: Adapter, names: NameResolver, weight: float) -> None:
        """Apply one change, keep it until all adapters are known, or note why it cannot be applied."""
        update, name = change.update, names.find(change.target)
        if update.follows:
            self._follow(change, name, names, weight)
        elif self.tie and (name in (self.tie.embedding, self.tie.head) or (not name and is_head(change.target))):
            self._keep_tied(change, name, adapter, weight)
        elif adapter.layers and (refusal := begins_elsewhere(update)):
            self._fault(update, refusal)
        elif name and not change.outputs:
            if self._claims(change, name):
                self._apply(update, name, weight)
        elif slots := names.slots(change.target):
            self._apply_parts(change, slots, weight)
        elif isinstance(update, Full) and update.may_add and not {change.module, change.target} & self._names:
            self.targets[change.target] = TargetTensor(update.value, None, added=True)
            self._names.add(change.target)
            if weight != 1:
                self._fault(update, f"adds {change.target}, which has no weight of {weight:g}")
            self._enter(update, "added", (change.target,), "the base has no such module")
        else:
            from ..naming.missing import explain_missing

            why = explain_missing(change.target, names, self.base)
            self._enter(update, "unmatched", (), why) if self.options.allow_unmatched else self._fault(update, why)

    def _follow(self, change: Change, name: str | None, names: NameResolver, weight: float) -> None:
        """Scale a bias as its weight is; a module without a bias has nothing to scale."""
        from .following import followed

        edit = followed(change.update, name, names, self.targets, self.item)
        self.faults += [Fault(change.target, edit)] if isinstance(edit, str) else []
        if name and isinstance(edit, Edit):
            self.targets[name].edits.append(replace(edit, weight=weight))

    def _claims(self, change: Change, name: str, outputs: tuple[int, int] | None = None) -> bool:
        """Note the outputs of a tensor that an addition is for; a fault if the adapter changes them already."""
        if change.beside or turn_of(change) < 2 or self._claimed.add(name, outputs):
            return True
        self._fault(change.update, f"changes {name}, which another tensor of the same adapter changes, too")
        return False

    def _apply_parts(self, change: Change, slots: Sequence[Slot], weight: float) -> None:
        """Cut an update of a weight that is several tensors, and add each part to its tensor."""
        from .cutting import cut

        parts = cut(change.update, slots, self.base, change.outputs)
        if isinstance(parts, str):
            self._fault(change.update, parts)
        elif all(self._claims(change, part.name, part.outputs) for part in parts):
            for part in parts:
                self._take(part.match, part.name, weight, part.outputs)
            self._enter_merged(change.update, tuple(dict.fromkeys(part.name for part in parts)))

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
            known = all(change.depth is not None for change in group)
            group.sort(key=lambda change: change.depth or 0)
            fitting = [
                [replace(change, target=target, among=()) for change, target in zip(group, order, strict=True)]
                for order in (combinations if known else permutations)(targets, len(group))
                if all(self._fits(change.update, name, names) for change, name in zip(group, order, strict=True))
            ]
            if len(fitting) == 1:
                yield from fitting[0]
            else:
                for change in group:
                    self._fault(change.update, f"may be for any of {', '.join(targets)}: shapes do not tell")

    def _fits(self, update: Update, target: str, names: NameResolver) -> bool:
        if name := names.find(target):
            return isinstance(self._match(update, name, self.targets[name].source.shape), Match)
        from .cutting import cut

        slots = names.slots(target)
        return bool(slots) and not isinstance(cut(update, slots, self.base), str)

    def _match(self, update: Update, name: str, shape: tuple[int, ...]) -> Match | str:
        return match_shape(update, name, shape, self.targets[name].source.dtype, self.base.model_types)

    def _keep_tied(self, change: Change, name: str | None, adapter: Adapter, weight: float) -> None:
        """Decide which sides of the tie a change is for, and keep the change."""
        assert self.tie
        embedding, head = self.tie.embedding, self.tie.head
        if refusal := self.tie.refusal or begins_elsewhere(change.update):
            self._fault(change.update, refusal)
            return
        on_embedding = name == embedding
        is_other_side = is_head if on_embedding else is_embedding
        other = next((c for c in adapter.changes if turn_of(c) == turn_of(change) and is_other_side(c.target)), None)
        sides: tuple[str, ...] = (embedding, head)
        if adapter.keeps_ties or (other and is_copy(change.update, other.update)):
            if other and not on_embedding:
                self._enter(change.update, "ignored", (), f"the same as for {embedding}, its tie")
                return
        elif not self._means_both(change.update, other, on_embedding=on_embedding):
            sides = (embedding if on_embedding else head,)
        self._tied_changes.append((change, sides, weight, self._number))

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
        self.untied = any(len(sides) == 1 for _, sides, *_ in self._tied_changes)
        if self.untied and not self.tie.stored:
            source = self.targets[self.tie.embedding].source
            self.targets[self.tie.head] = TargetTensor(source, source, added=True)
        for change, sides, weight, number in self._tied_changes:
            self._number = number
            into = tuple(side for side in sides if side in self.targets)
            for side in into:
                self._apply(change.update, side, weight, into)
        sides = (self.tie.embedding, self.tie.head)
        if self.untied:
            from .untied import resize

            warnings = [resize(self.targets, self.ledger, *pair) for pair in (sides, sides[::-1])]
            self.warnings += filter(None, warnings)

    def _apply(self, update: Update, name: str, weight: float, into: tuple[str, ...] = ()) -> None:
        """Add an update to its tensor, or note why the update does not match."""
        target = self.targets[name]
        shape = target.shape if isinstance(update, Rows) else target.source.shape
        if isinstance(update, Full) and (is_embedding(name) or is_head(name)):
            shape = (*update.value.shape[:1], *shape[1:])  # only an embedding or a head may have other rows
        match = self._match(update, name, shape)
        if isinstance(match, Match):
            self._take(match, name, weight)
        else:
            self._fault(update, match)
        if not into or name == into[0]:  # one entry for both sides of a tie
            self._enter_merged(update, into or (name,))

    def _take(self, match: Match, name: str, weight: float, outputs: tuple[int, int] | None = None) -> None:
        """Add a matched update to its tensor, for some of the tensor's outputs or for all."""
        density = densities[self._number] if (densities := self.options.combination.densities) else 1.0
        match match.update:
            case Transform() | Decomposed() | Delta() as edit:
                made = Edit(edit, match.transposed, weight, outputs, density, kernel=match.kernel)
                self.targets[name].edits.append(made)
            case Full() as full if self._combines(full, self.targets[name]):
                self.targets[name].edits.append(Edit(full, False, weight, density=density))
                self._combined.add(name)
            case Full() | Rows() as value:
                self._replace(value, name, weight)

    def _combines(self, update: Full, target: TargetTensor) -> bool:
        """Return True if a tensor that is stored whole counts as its difference from the base's."""
        if self.options.combination.method == "sum" and self._adapters[self._number].format != "checkpoint":
            return False
        from .methods import is_change

        return is_change(update, target.source, target.base, self.options.combination)

    def _replace(self, update: Full | Rows, name: str, weight: float) -> None:
        """Let an adapter's tensor, or its rows, take the place of the base's."""
        from .replacements import put

        own, chained = self._adapters[self._number].source.name, self.options.combination.method == "chain"
        faults, warning = put(update, self.targets[name], name, by=own, chained=chained)
        for why in faults:
            self._fault(update, why)
        if weight != 1:
            what = "replaces" if isinstance(update, Full) else "replaces rows of"
            self._fault(update, f"{what} {name}, which has no weight of {weight:g}")
        self.warnings += [warning] if warning else []

    def _enter_merged(self, update: Update, into: tuple[str, ...]) -> None:
        edits = self.targets[into[0]].edits
        replaces = isinstance(update, (Full, Rows)) and not any(update == edit.update for edit in edits)
        self._enter(update, "replaced" if replaces else "merged", into, update.title)

    def _enter(self, update: Update, fate: str, into: tuple[str, ...], why: str) -> None:
        self.ledger += [Entry(tensor.name, fate, into, why) for tensor in update.tensors]

    def _fault(self, update: Update, why: str) -> None:
        if isinstance(update, Full) and update.file:
            why = f"in {update.file}; {why}"
            self.beside.setdefault(update.file, []).append(update)
        self.faults += [Fault(tensor.name, why) for tensor in update.tensors]

    def item(self, name: str) -> Item:
        """Return an output tensor."""
        target = self.targets[name]
        dtype = (target.base or target.source).dtype
        base = target.base and stacked(target.base, target.edits)
        item = Item(
            name=name,
            dtype=self.options.dtype if self.options.dtype and dtype in FLOATS else dtype,
            shape=target.shape,
            source=base if target.source is target.base and base else stacked(target.source, target.edits),
            base=base,
            rows=tuple(target.rows),
            edits=tuple(target.edits),
            added=target.added,
            origin=self.base.stored_name(base.name) if base else name,
        )
        if name in self._combined or not self.options.combination.is_sum:
            from .methods import combined

            item = combined(item, self.options.combination)
        alone = len(item.edits) == 1 and item.edits[0].weight == 1 and not item.combination
        if not alone and item.start:
            self._fault(item.start, f"began training with another {name}: it is merged alone and at weight 1")
        for edit in item.edits if target.rows and item.grown else ():
            self._fault(edit.update, f"is for a {name} without the rows that another adapter adds")
        return item
