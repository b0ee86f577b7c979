"""Lay output tensors out in files, and write the bytes that describe the files: headers and the index."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

from ..errors import UsageError
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import INDEX_SUFFIX
from ..storage.safetensors import BITS
from .item import Item
from .plan import OutputShard, Plan

SWOLLEN = 1.5
"""Shards are cut again if additions make one larger than this many times the base's largest."""


def lay_out(
    base: Checkpoint, items: Mapping[str, Item], max_shard_size: int | None
) -> tuple[tuple[OutputShard, ...], str | None]:
    """Return the output shards and the index's name: the base's shards, or shards of at most a size in bytes.

    An added tensor joins the shard of the tensor it derives from, else the last shard. A tensor larger than
    the limit gets its own shard.
    """
    if max_shard_size is not None and base.is_pipeline:
        raise UsageError("--max-shard-size does not go with a pipeline: its components keep their files.")
    groups = _as_base(base, items)
    changed = any(item.added or item.source is not item.base for item in items.values())
    if max_shard_size is None and base.index_name and changed:
        max_shard_size = _limit_of_swollen(base, groups)
    if max_shard_size is None:
        return tuple(
            OutputShard(converted(shard.filename), shard.metadata, _aligned(group))
            for shard, group in zip(base.shards, groups, strict=True)
            if group or len(groups) == 1
        ), base.index_name and converted(base.index_name)
    groups = _cut([item for group in groups for item in group], max_shard_size)
    stem = converted(base.index_name or base.shards[0].filename)  # usually `model`
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem.removesuffix(INDEX_SUFFIX).removesuffix(".safetensors"))
    several = len(groups) > 1
    return tuple(
        OutputShard(
            f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" if several else f"{stem}.safetensors",
            base.shards[0].metadata,
            _aligned(group),
        )
        for number, group in enumerate(groups, 1)
    ), stem + INDEX_SUFFIX if several else None


def _limit_of_swollen(base: Checkpoint, groups: Sequence[Sequence[Item]]) -> int | None:
    """Return the size of the base's largest shard if one of the output's is much larger."""
    largest = max(sum(tensor.nbytes for tensor in shard.tensors) for shard in base.shards)
    swollen = any(sum(item.source.nbytes for item in group) > SWOLLEN * largest for group in groups)
    return largest if swollen else None


def _as_base(base: Checkpoint, items: Mapping[str, Item]) -> list[list[Item]]:
    """Return the items shard by shard, in the base's order."""
    groups = [[items[tensor.name] for tensor in shard.tensors] for shard in base.shards]
    if len(items) == sum(map(len, groups)):
        return groups
    owner = {tensor.name: number for number, shard in enumerate(base.shards) for tensor in shard.tensors}
    for item in items.values():
        if item.name not in owner:
            groups[owner.get(item.base.name, -1) if item.base else -1].append(item)
    return groups


def _aligned(items: Sequence[Item]) -> tuple[Item, ...]:
    """Return the items in an order that aligns every tensor to its element size.

    The given order does if no dtype changes; else the items are sorted by falling element size.
    """
    if all(item.base and item.dtype == item.base.dtype and not item.base.coded for item in items):
        return tuple(items)
    return tuple(sorted(items, key=lambda item: -BITS[item.dtype]))


def converted(filename: str) -> str:
    """Return the safetensors name of a weight file or an index."""
    name = re.sub(r"(^|/)pytorch_model(?=[-.])", r"\1model", filename)
    return re.sub(r"\.(bin|pt|pth)(?=$|\.index\.json$)", ".safetensors", name)


def _cut(items: Sequence[Item], limit: int) -> list[list[Item]]:
    """Return shards filled greedily, in order."""
    groups: list[list[Item]] = [[]]
    room = limit
    for item in items:
        if item.nbytes > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= item.nbytes
    return groups


def index_bytes(plan: Plan) -> bytes:
    """Return the index of a sharded output, in the form that transformers writes."""
    table = {item.name: shard.filename for shard in plan.shards for item in shard.items}
    numel = sum(math.prod(item.shape) for item in plan.items)
    index = {"metadata": {"total_parameters": numel, "total_size": plan.bytes_out}, "weight_map": table}
    return (json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
