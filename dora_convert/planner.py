"""From base and adapter headers to a plan, or to one error with everything that does not fit.

Pure: reads nothing but its arguments, prints and writes nothing. Here, and only here, the three axes meet: adapter
format, tensor names, and how the base stores its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from .adapter import Adapter, Change
from .checkpoint import Checkpoint
from .errors import Fault, PlanError, UnsupportedError
from .layout import lay_out
from .names import Misfit, place
from .plan import Edit, Entry, Item, Options, Plan
from .slots import Slot
from .stored import FLOATS, Stored
from .updates import Decomposed, Full, low_rank, tensors_of


def make_plan(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], options: Options
) -> Plan:
    """Decide every output tensor.

    Raises UnsupportedError for bases refused as a whole, UsageError for weights that cannot be applied, and PlanError
    with every fault of every adapter otherwise.
    """
    _refuse_quantised(base)
    draft = _Draft(base, options)
    for adapter, weight in zip(adapters, weights, strict=True):
        draft.add(adapter, weight)
    draft.check(adapters)
    items = {name: draft.item(tensor) for name, tensor in base.tensors.items()}
    shards, index_name = lay_out(base, items, options.max_shard_size)
    return Plan(base, tuple(adapters), tuple(weights), options, shards, index_name, tuple(draft.ledger))


@dataclass
class _Draft:
    """A plan while adapters are being added to it."""

    base: Checkpoint
    options: Options
    replaced: dict[str, Stored] = field(default_factory=dict)
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    ledger: list[Entry] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add(self, adapter: Adapter, weight: float) -> None:
        """Place every change of an adapter."""
        self.ledger += [Entry(name, "ignored", (), why) for name, why in adapter.ignored.items()]
        for change in adapter.changes:
            names = [tensor.name for tensor in tensors_of(change.update)]
            if not self._chosen(change):
                self.ledger += [Entry(name, "ignored", (), "left out by name") for name in names]
                continue
            match place(change, self.base):
                case Slot() as slot:
                    self._apply(change, slot, weight)
                case Misfit(why, unmatched=True) if self.options.allow_unmatched:
                    self.ledger += [Entry(name, "unmatched", (), why) for name in names]
                case Misfit(why):
                    self.faults += [Fault(name, why) for name in names]

    def _chosen(self, change: Change) -> bool:
        module = change.target.rpartition(".")[0]
        wanted = not self.options.include or _matches(module, self.options.include)
        return wanted and not _matches(module, self.options.exclude)

    def _apply(self, change: Change, slot: Slot, weight: float) -> None:
        target, update = change.target, change.update
        if not isinstance(update, Full):
            self.edits.setdefault(target, []).append(Edit(update, slot, weight))
            self.ledger += [
                Entry(tensor.name, "merged", (target,), _how(change)) for tensor in tensors_of(update)
            ]
            return
        if target in self.replaced:
            self.faults.append(Fault(update.value.name, f"another adapter replaces {target}, too"))
        if weight != 1:
            self.faults.append(
                Fault(update.value.name, f"replaces {target}, which has no weight of {weight:g}")
            )
        self.replaced[target] = update.value
        self.ledger.append(Entry(update.value.name, "replaced", (target,), "saved whole by the adapter"))

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise all faults at once."""
        if self.faults:
            raise PlanError(
                f"{len(self.faults)} adapter tensors have no place in the base.",
                faults=self.faults,
                hint="is this the base that the adapter was trained on?",
            )
        if not self.edits and not self.replaced:
            names = ", ".join(adapter.source.name for adapter in adapters)
            raise PlanError(f"Nothing to merge: no tensor of {names} is left to apply.")

    def item(self, tensor: Stored) -> Item:
        """The output tensor made from one of the base's."""
        dtype = self.options.dtype if self.options.dtype and tensor.dtype in FLOATS else tensor.dtype
        source = self.replaced.get(tensor.name, tensor)
        edits = tuple(self.edits.get(tensor.name, ()))
        return Item(tensor.name, dtype, tensor.shape, tensor, source, edits)


def _matches(module: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(module, glob) for glob in globs)


def _how(change: Change) -> str:
    assert not isinstance(change.update, Full)
    low = low_rank(change.update)
    kind = "DoRA" if isinstance(change.update, Decomposed) else "LoRA"
    return f"{kind}, rank {low.rank}, scaling {low.scale:g}"


def _refuse_quantised(base: Checkpoint) -> None:
    for config in _configs(base.config):
        if isinstance(method := config.get("quantization_config"), Mapping):
            raise UnsupportedError(
                f"BASE {base.source.name} is quantised ({method.get('quant_method', 'unknown method')}); "
                "merging into quantised weights is not done yet.",
                hint="name the full-precision checkpoint that it was made from",
            )


def _configs(config: object) -> Iterator[Mapping[str, object]]:
    """A config and every config nested in it."""
    if isinstance(config, Mapping):
        yield config
        for value in config.values():
            yield from _configs(value)
