"""Make a plan of base and adapter headers, or one error that names everything that does not fit.

Only headers are read, except if an adapter brings both sides of a tied embedding: the two tensors are then
compared. This file alone brings the three axes together: adapter formats, tensor names, and the base's
storage of weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..adapters import Adapter, Full, Rows, Update, unwrapped
from ..errors import Fault, PlanError, UnsupportedError, UsageError
from ..naming.families import COUNTS, LAYERS, PAST_LORA
from ..naming.resolve import NameResolver, TableOnDemand, Tie, find_tie, is_embedding, is_head, is_linear
from ..storage.checkpoint import Checkpoint
from .builder import PlanBuilder
from .item import Item
from .plan import Options, Plan
from .sharding import lay_out

if TYPE_CHECKING:
    from .quantised import QuantisedBase
    from .stored_numbers import Questions

DECOMPOSED = ("Decomposed", "Undecided")
"""Kinds of update that have magnitudes."""


def make_plan(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], options: Options,
    later: Questions | None = None,
) -> Plan:  # fmt: skip
    """Decide every output tensor.

    Questions that wait for torch go to `later`, if given: an answer to one means that the plan must be made again.

    Raises UnsupportedError for bases that are refused as a whole, UsageError for weights that cannot be
    applied, and PlanError with every fault of every adapter otherwise.
    """
    quantised = _quantised(base, options)
    whole = quantised.dense if quantised else base
    adapters = [_for_base(adapter, whole) for adapter in adapters]
    tree = _with_layers(whole, adapters, options)
    names = _resolvers(tree, adapters, options)
    tie = find_tie(tree, tasks := [adapter.task for adapter in adapters if adapter.task])
    if prefix := _prefix(adapters, names, tie, options):
        from ..naming.views import with_names

        tree = with_names(tree, lambda name: [prefix + name])
        names, tie = _resolvers(tree, adapters, options), find_tie(tree, tasks)
    adapters = [_settled(adapter, resolver, tree, later) for adapter, resolver in zip(adapters, names, strict=True)]
    builder = PlanBuilder(tree, tie, options)
    for adapter, resolver, weight in zip(adapters, names, weights, strict=True):
        builder.add(adapter, resolver, weight)
    builder.settle_ties()
    resized = _resized(items := {name: builder.item(name) for name in builder.targets})
    builder.faults += _resized_alone(items, resized)
    if quantised:
        quantised.refuse_unread(builder.faults)
    _check(builder, items, base, adapters)
    missing = [
        find_missing(adapter, resolver, tree, tie, options) for adapter, resolver in zip(adapters, names, strict=True)
    ]
    _warn(builder, adapters, missing, items)
    config = _output_config(builder, items, resized, tasks)
    shards, index_name = lay_out(tree, items, options.max_shard_size)
    plan = Plan(
        base=base,
        adapters=tuple(adapters),
        weights=tuple(weights),
        options=options,
        shards=shards,
        index_name=index_name,
        ledger=tuple(builder.ledger),
        config=config if config != base.config else None,
        warnings=tuple(builder.warnings),
    )
    return _unless_a_file(quantised.settled(plan, items, tree) if quantised else plan)


def left_out(plan: Plan) -> Iterator[str]:
    """Yield a warning about adapter tensors without a place in the base, which the caller allows."""
    entries = plan.ledger if plan.options.allow_unmatched else ()
    if names := [entry.tensor for entry in entries if entry.fate == "unmatched"]:
        from .explain import warn_of_unmatched

        yield warn_of_unmatched(names)


def _unless_a_file(plan: Plan) -> Plan:
    """Return a plan; raise UnsupportedError if it changes config.json, and the base is a single file."""
    if plan.config and plan.base.is_bare:
        raise UnsupportedError(
            f"This merge changes config.json, too, and BASE {plan.base.source.name} is a single file.",
            hint=f"name its folder: {plan.base.root}",
        )
    return plan


def _warn(
    builder: PlanBuilder, adapters: Sequence[Adapter], missing: Sequence[Sequence[str]], items: Mapping[str, Item]
) -> None:
    """Enter a warning for each adapter that is not complete, and for layers that training did not change."""
    if any(missing):
        from .explain import entries_of_missing, warn_of_missing

        builder.warnings += warn_of_missing(adapters, missing, builder.options)
        builder.ledger += entries_of_missing(missing)
    if builder.base.model_types & PAST_LORA.keys():
        from .explain import warn_of_past_lora

        builder.warnings += warn_of_past_lora(builder.base, items)


def _for_base(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter with the base's names, and with all decided that its files leave to the base."""
    if adapter.naming != "dotted":
        from ..naming.flattened import with_base_names

        adapter = with_base_names(adapter, base)
    return adapter.fit(adapter, base) if adapter.fit else adapter


def _with_layers(base: Checkpoint, adapters: Sequence[Adapter], options: Options) -> Checkpoint:
    """Return the base with its layers repeated as the adapters' models had them; some adapters are refused."""
    if not adapters:
        raise UsageError("No ADAPTER is given.")
    if (method := options.combination.method) != "sum" and any(c.beside for each in adapters for c in each.changes):
        raise UnsupportedError(f"--method {method} does not take a DoRA whose scaling adds beside it (ai-toolkit).")
    orders = {adapter.layers for adapter in adapters}
    if len(orders) > 1:
        raise PlanError("The adapters were trained on different orders of layers (layer_replication).")
    if not (layers := orders.pop()):
        return base
    from ..naming.views import replicate

    return replicate(base, layers)


def _resolvers(tree: Checkpoint, adapters: Sequence[Adapter], options: Options) -> list[NameResolver]:
    table = TableOnDemand(tree)
    return [NameResolver(tree.tensors, _targets(adapter, options), table) for adapter in adapters]


def _settled(adapter: Adapter, names: NameResolver, base: Checkpoint, later: Questions | None) -> Adapter:
    """Return an adapter whose changes have no names of training programs, and nothing that is left open."""
    if any(type(change.update).__name__ in DECOMPOSED for change in adapter.changes):
        from .evidence import decide

        adapter = decide(adapter, names.find, base, later)
    if all(unwrapped(change.target) == change.target for change in adapter.changes):
        return adapter
    changes = (
        replace(change, target=names.settled(change.target), among=tuple(map(names.settled, change.among)))
        for change in adapter.changes
    )
    return replace(adapter, changes=tuple(changes))


def _targets(adapter: Adapter, options: Options) -> list[str]:
    """Return the targets that the base must have, under whatever names."""
    inner = [change for change in adapter.changes if not is_head(change.target)]
    if options.selective:
        inner = [change for change in inner if options.selects(unwrapped(change.module))]
    certain = [change.target for change in inner if not isinstance(change.update, Full | Rows)]
    return certain or [change.target for change in inner]


def _prefix(
    adapters: Sequence[Adapter], names: Sequence[NameResolver], tie: Tie | None, options: Options
) -> str | None:
    """Return the prefix of a bare model's tensors inside the model with the head that an adapter adds."""
    prefixes = {
        resolver.prefix.drop
        for adapter, resolver in zip(adapters, names, strict=True)
        if resolver.prefix.drop and not resolver.prefix.add
        for change in adapter.changes
        if options.selects(change.module) and _needs_head(change.update, resolver.find(change.target), tie)
    }
    return prefixes.pop() if len(prefixes) == 1 else None


def _needs_head(update: Update, name: str | None, tie: Tie | None) -> bool:
    """Return True if an update brings a head that the base lacks, or makes a head of the embedding."""
    if isinstance(update, Full) and update.may_add and not name:
        return True
    return bool(tie and not tie.stored and name == tie.embedding and not isinstance(update, Rows))


def _check(builder: PlanBuilder, items: Mapping[str, Item], base: Checkpoint, adapters: Sequence[Adapter]) -> None:
    """Raise all faults at once."""
    if builder.faults:
        from .explain import refuse

        refuse(builder.faults, builder.beside, base, adapters)
    if not any(item.changed for item in items.values()):
        names = ", ".join(adapter.source.name for adapter in adapters)
        raise PlanError(f"Nothing to do: no tensor of {names} is left to apply.")


def _resized(items: Mapping[str, Item]) -> dict[str, tuple[int, int]]:
    """Return the old and new row counts of embeddings and heads that an adapter resizes."""
    return {
        name: (item.base.shape[0], item.shape[0])
        for name, item in items.items()
        if item.base and item.base.shape[:1] != item.shape[:1] and (is_embedding(name) or is_head(name))
    }


def _resized_alone(items: Mapping[str, Item], resized: Mapping[str, tuple[int, int]]) -> Iterator[Fault]:
    """Yield a fault for every tensor that should have been resized along with an embedding or a head."""
    if not resized:
        return
    old, new = next(iter(resized.values()))
    for name, item in items.items():
        module = name.rpartition(".")[0]
        partner = is_embedding(name) or is_head(name) or is_head(f"{module}.weight")
        if partner and item.shape[:1] == (old,) != (new,):
            why = f"has {old} rows, but {', '.join(resized)} {'has' if len(resized) == 1 else 'have'} {new}"
            yield Fault(name, f"{why}: the adapter must bring both")


def _output_config(
    builder: PlanBuilder, items: Mapping[str, Item], resized: Mapping[str, tuple[int, int]], tasks: Sequence[str]
) -> Mapping[str, Any] | None:
    """Return the output's config."""
    added = {name: item.shape for name, item in items.items() if item.added and item.base is None}
    config, options = builder.base.config, builder.options
    if config is None or not (options.dtype or options.legacy_config or builder.untied or resized or added):
        return config
    from .config_json import for_output

    headless = builder.untied and bool(builder.base.renamed)
    return for_output(
        config, options, next(iter(tasks), None), untie=builder.untied, resized=resized, added=added, headless=headless
    )


def _quantised(base: Checkpoint, options: Options) -> QuantisedBase | None:
    """Return what is known of a quantised base; None for a dense one, without a look at codecs."""
    if not base.may_be_quantised and not options.quantised.startswith("as "):
        return None
    from .quantised import QuantisedBase

    return QuantisedBase.of(base, options)


EXPERTS = ".experts."


def find_missing(
    adapter: Adapter, names: NameResolver, base: Checkpoint, tie: Tie | None, options: Options
) -> list[str]:
    """Return the missing weights, sorted, by the adapter's names.

    Weights that the caller leaves out do not count, nor layers past the model's last one, which train only the
    base itself, nor experts if the adapter has none: running models hold them in other modules.
    """
    if not adapter.promised:
        return []
    shapes = names.model_shapes()
    if tie and (head := names.prefix.undo(tie.head)):
        shapes.setdefault(head, base.tensors[tie.embedding].shape)  # the running model has both
    # a copy of the base's tensor beside its factors says nothing of training
    changes = [each for each in adapter.changes if not (isinstance(each.update, Full) and each.update.copied)]
    targets = [change.target for change in changes]
    targets += [target for change in changes if change.among for target in change.among]
    untouched = dict(shapes)
    for target in targets:
        untouched.pop(target, None)
    if not (left := adapter.promised(untouched, lambda name: len(shapes[name]) == 2 and is_linear(name))):
        return []

    def places(name: str) -> Collection[tuple[str, tuple[int, int] | None]]:
        return names.places(name) or {(names.prefix.apply(name), None)}  # a tied head is not on disk

    covered = {place for target in targets for place in places(target)}
    tied = {(tie.embedding, None), (tie.head, None)} if tie else set()
    if covered & tied:
        covered |= tied
    has_experts = any(EXPERTS in target for target in targets)
    return sorted(
        name
        for name in set(left)
        if covered.isdisjoint(places(name))
        and options.selects(name.rpartition(".")[0])
        and (has_experts or EXPERTS not in name)
        and not _is_past_the_last_layer(name, base)
    )


def _is_past_the_last_layer(name: str, base: Checkpoint) -> bool:
    counts = [count for config in base.configs for key in COUNTS if isinstance(count := config.get(key), int)]
    layer = re.match(LAYERS, name)
    return bool(counts and layer) and int(layer["number"]) >= max(counts)  # type: ignore[index] # bool
