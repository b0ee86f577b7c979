"""Show a base under other tensor names: with repeated layers, or inside another module.

Both make a checkpoint that no folder holds: the same bytes under other names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import PlanError
from ..storage.checkpoint import Checkpoint, Shard
from .families import COUNTS, LAYERS


def replicate(base: Checkpoint, layers: Sequence[int]) -> Checkpoint:
    """Return the base with its layers in the order that PEFT's `layer_replication` says.

    Raises PlanError if the base has no such layers, or several stacks of layers.
    """
    matches = [match for name in base.tensors if (match := re.fullmatch(LAYERS, name))]
    stacks = {match["before"] for match in matches}
    count = 1 + max((int(match["number"]) for match in matches), default=-1)
    if len(stacks) != 1:
        raise PlanError(
            f"layer_replication needs a base with one stack of layers; {base.source.name} has {len(stacks)}."
        )
    if max(layers) >= count:
        raise PlanError(f"layer_replication names layer {max(layers)}; the base has {count}.")

    def copies(name: str) -> list[str]:
        if not (match := re.fullmatch(LAYERS, name)):
            return [name]
        numbers = [number for number, layer in enumerate(layers) if layer == int(match["number"])]
        return [f"{match['before']}{number}{match['after']}" for number in numbers]

    config = base.config and _with_layers(base.config, layers, count)
    return replace(with_names(base, copies), config=config)


def with_names(base: Checkpoint, names: Callable[[str], Sequence[str]]) -> Checkpoint:
    """Return the base with every tensor under its new names."""

    def under_new_names(shard: Shard) -> Shard:
        return replace(shard, tensors=tuple(replace(old, name=new) for old in shard.tensors for new in names(old.name)))

    renamed = {new: base.stored_name(old) for old in base.tensors for new in names(old)}
    return replace(base, shards=tuple(map(under_new_names, base.shards)), renamed=renamed)


def _with_layers(config: Mapping[str, Any], layers: Sequence[int], count: int) -> dict[str, Any]:
    """Return a config for the new layers: their number, and every list with one entry for each layer."""
    counted = any(config.get(key) == count for key in COUNTS)
    edited: dict[str, Any] = {}
    for key, value in config.items():
        edited[key] = value
        if counted and key in COUNTS and value == count:
            edited[key] = len(layers)
        elif counted and isinstance(value, list) and len(value) == count and "layer" in key:
            edited[key] = [value[layer] for layer in layers]
        elif isinstance(value, Mapping):
            edited[key] = _with_layers(value, layers, count)
    return edited
