"""Layers written out more than once, as PEFT's `layer_replication` has them, and names with another prefix.

Both make a checkpoint that no folder holds: the same bytes under other names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import PlanError
from ..storage.checkpoint import Checkpoint, Shard
from ..storage.safetensors import StoredTensor

LAYERS = re.compile(r"(?P<before>.*?(?:layers|encoder\.layer|(?:^|\.)h)\.)(?P<number>\d+)(?P<after>\..*)")
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


def replicate(base: Checkpoint, layers: Sequence[int]) -> Checkpoint:
    """A base whose layers are these of its own, in this order.

    Raises PlanError where it has no such layers, or several stacks of them.
    """
    found = [match for name in base.tensors if (match := LAYERS.fullmatch(name))]
    stacks = {match["before"] for match in found}
    count = 1 + max((int(match["number"]) for match in found), default=-1)
    if len(stacks) != 1:
        raise PlanError(
            f"layer_replication needs a base with one stack of layers; {base.source.name} has {len(stacks)}."
        )
    if max(layers) >= count:
        raise PlanError(f"layer_replication names layer {max(layers)}; the base has {count}.")

    def copies(tensor: StoredTensor) -> list[str]:
        if not (match := LAYERS.fullmatch(tensor.name)):
            return [tensor.name]
        return [
            f"{match['before']}{place}{match['after']}"
            for place, layer in enumerate(layers)
            if layer == int(match["number"])
        ]

    config = base.config and _with_layers(base.config, layers, count)
    return replace(_renamed(base, copies), config=config)


def prefixed(base: Checkpoint, prefix: str) -> Checkpoint:
    """A base whose tensors are all called by their names inside another module."""
    return _renamed(base, lambda tensor: [prefix + tensor.name])


def _renamed(base: Checkpoint, names: Callable[[StoredTensor], Sequence[str]]) -> Checkpoint:
    """A base whose tensors are there under these names."""
    shards: list[Shard] = []
    renamed: dict[str, str] = {}
    for shard in base.shards:
        copies = [replace(tensor, name=name) for tensor in shard.tensors for name in names(tensor)]
        renamed |= {name: base.stored_name(tensor.name) for tensor in shard.tensors for name in names(tensor)}
        shards.append(replace(shard, tensors=tuple(copies)))
    return replace(base, shards=tuple(shards), renamed=renamed)


def _with_layers(config: Mapping[str, Any], layers: Sequence[int], count: int) -> dict[str, Any]:
    """A config for those layers: their number, and every list that has an entry for each."""
    mine = any(config.get(key) == count for key in COUNTS)
    edited: dict[str, Any] = {}
    for key, value in config.items():
        edited[key] = value
        if mine and key in COUNTS and value == count:
            edited[key] = len(layers)
        elif mine and isinstance(value, list) and len(value) == count and "layer" in key:
            edited[key] = [value[layer] for layer in layers]
        elif isinstance(value, Mapping):
            edited[key] = _with_layers(value, layers, count)
    return edited
