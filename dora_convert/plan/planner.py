"""From base and adapter headers to a plan, or to one error with everything that does not fit.

Prints and writes nothing, and reads nothing but headers: only where an adapter brings both sides of a tied embedding
are the two compared. Here, and only here, the three axes meet: adapter format, tensor names, and how the base stores
its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..adapters.adapter import Adapter, Change
from ..adapters.updates import Full, Rows
from ..errors import Fault, PlanError, UnsupportedError
from ..naming.resolve import NameResolver
from ..naming.ties import Tie, find_tie, is_embedding, is_head
from ..naming.views import prefixed, replicate
from ..storage.checkpoint import Checkpoint
from . import config_json as configs
from .builder import PlanBuilder
from .item import Item
from .options import Options
from .plan import Plan
from .sharding import lay_out


def make_plan(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], options: Options
) -> Plan:
    """Decide every output tensor.

    Raises UnsupportedError for bases refused as a whole, UsageError for weights that cannot be applied, and PlanError
    with every fault of every adapter otherwise.
    """
    refuse_quantised(base)
    tree = _with_layers(base, adapters)
    names = [NameResolver(tree.tensors, _targets(adapter, options)) for adapter in adapters]
    tasks = [adapter.task for adapter in adapters if adapter.task]
    tree, names = _with_prefix(tree, adapters, names, tasks, options)
    builder = PlanBuilder(tree, tasks, options)
    for adapter, known, weight in zip(adapters, names, weights, strict=True):
        builder.add(adapter, known, weight, lambda change: is_chosen(change, options))
    builder.settle_ties()
    items = builder.items()
    builder.faults += _resized_alone(items)
    _check(builder, adapters)
    config = _config(builder, items, adapters)
    shards, index_name = lay_out(tree, items, options.max_shard_size)
    changed = config if config != base.config else None
    if changed and base.is_file:
        raise UnsupportedError(
            f"This merge changes config.json, too, and BASE {base.source.name} is a single file.",
            hint=f"name its folder: {base.root}",
        )
    return Plan(
        base, tuple(adapters), tuple(weights), options, shards, index_name, tuple(builder.ledger), changed
    )


def _with_layers(base: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """The base as the adapters' models had its layers."""
    orders = {adapter.layers for adapter in adapters}
    if len(orders) > 1:
        raise PlanError("The adapters were trained on different orders of layers (layer_replication).")
    layers = orders.pop()
    return replicate(base, layers) if layers else base


def _with_prefix(
    tree: Checkpoint,
    adapters: Sequence[Adapter],
    names: Sequence[NameResolver],
    tasks: Sequence[str],
    options: Options,
) -> tuple[Checkpoint, list[NameResolver]]:
    """A base that is the bare model, called by the names it has inside the model with the head that is added."""
    tie = find_tie(tree, tasks)
    prefixes = {
        known.prefix.drop
        for adapter, known in zip(adapters, names, strict=True)
        if known.prefix.drop and not known.prefix.add and _needs_head(adapter, known, tie, options)
    }
    if len(prefixes) != 1:
        return tree, list(names)
    tree = prefixed(tree, prefixes.pop())
    return tree, [NameResolver(tree.tensors, _targets(adapter, options)) for adapter in adapters]


def _needs_head(adapter: Adapter, names: NameResolver, tie: Tie | None, options: Options) -> bool:
    """Whether an adapter brings a head that the base lacks, or makes one of the embedding."""
    for change in adapter.changes:
        name = names.find(change.target)
        brings = isinstance(change.update, Full) and change.update.may_add and not name
        unties = tie and not tie.stored and name == tie.embedding and not isinstance(change.update, Rows)
        if (brings or unties) and is_chosen(change, options):
            return True
    return False


def _targets(adapter: Adapter, options: Options) -> list[str]:
    """The targets that must be in the base, whatever they are called there."""
    inner = [
        change for change in adapter.changes if is_chosen(change, options) and not is_head(change.target)
    ]
    sure = [change.target for change in inner if not isinstance(change.update, Full | Rows)]
    return sure or [change.target for change in inner]


def is_chosen(change: Change, options: Options) -> bool:
    """Whether --include and --exclude leave a change in."""
    return is_named(change.target.rpartition(".")[0], options)


def is_named(module: str, options: Options) -> bool:
    """Whether --include and --exclude leave a module in."""
    wanted = not options.include or _matches(module, options.include)
    return wanted and not _matches(module, options.exclude)


def _matches(module: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(module, glob) for glob in globs)


def _check(builder: PlanBuilder, adapters: Sequence[Adapter]) -> None:
    """Raise all faults at once."""
    if builder.faults:
        wrong = "contradict themselves, or " if any(adapter.faults for adapter in adapters) else ""
        raise PlanError(
            f"{len(builder.faults)} adapter tensors {wrong}have no place in the base.",
            faults=builder.faults,
            hint="is this the base that the adapter was trained on?",
        )
    if not any(target.touched for target in builder.targets.values()):
        names = ", ".join(adapter.source.name for adapter in adapters)
        raise PlanError(f"Nothing to merge: no tensor of {names} is left to apply.")


def _resized(items: Mapping[str, Item]) -> dict[str, tuple[int, int]]:
    """Embeddings and heads that have another number of rows than the base's: old and new."""
    return {
        name: (item.base.shape[0], item.shape[0])
        for name, item in items.items()
        if item.base
        and (is_embedding(name) or is_head(name))
        and item.base.shape[:1] != item.source.shape[:1]
    }


def _resized_alone(items: Mapping[str, Item]) -> Iterator[Fault]:
    """What had to be resized along with an embedding or a head, and was not."""
    if not (resized := _resized(items)):
        return
    old, new = next(iter(resized.values()))
    for name, item in items.items():
        module = name.rpartition(".")[0]
        partner = is_embedding(name) or is_head(name) or is_head(f"{module}.weight")
        if partner and item.shape[:1] == (old,) != (new,):
            why = f"has {old} rows, but {', '.join(resized)} {'has' if len(resized) == 1 else 'have'} {new}"
            yield Fault(name, f"{why}: the adapter must bring both")


def _config(
    builder: PlanBuilder, items: Mapping[str, Item], adapters: Sequence[Adapter]
) -> Mapping[str, Any] | None:
    """The output's config."""
    config = builder.base.config
    if config is None:
        return None
    if builder.options.dtype:
        config = configs.with_dtype(config, builder.options.dtype)
    if builder.untied:
        config = configs.untied(config)
    for old, new in list(_resized(items).values())[:1]:
        config = configs.with_vocabulary(config, old, new)
    added = {name: item.shape for name, item in items.items() if item.added and item.base is None}
    tasks = [adapter.task for adapter in adapters if adapter.task]
    if added or (builder.untied and builder.base.renamed):
        config = configs.with_head(config, next(iter(tasks), None), added)
    return config


def refuse_quantised(base: Checkpoint) -> None:
    """Raise UnsupportedError for quantised weights."""
    for config in base.configs:
        if isinstance(method := config.get("quantization_config"), Mapping):
            raise UnsupportedError(
                f"{base.source.name} is quantised ({method.get('quant_method', 'unknown method')}); "
                "merging into quantised weights is not done yet.",
                hint="name the full-precision checkpoint that it was made from",
            )
