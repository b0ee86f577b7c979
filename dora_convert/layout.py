"""Which output tensor goes into which file, and the bytes that describe it: headers and the index."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from .checkpoint import INDEX_SUFFIX, Checkpoint
from .plan import Item, OutputShard, Plan
from .stored import BITS


def lay_out(
    base: Checkpoint, items: Mapping[str, Item], max_shard_size: int | None
) -> tuple[tuple[OutputShard, ...], str | None]:
    """Output shards and the index's name: the base's own sharding, or shards of at most a size in bytes.

    A tensor larger than the limit gets a shard of its own.
    """
    if max_shard_size is None:
        return tuple(
            OutputShard(
                shard.filename, shard.metadata, _aligned(items[tensor.name] for tensor in shard.tensors)
            )
            for shard in base.shards
        ), base.index_name
    ordered = [items[tensor.name] for shard in base.shards for tensor in shard.tensors]
    groups = _cut(ordered, max_shard_size)
    stem, metadata = _stem(base), base.shards[0].metadata
    if len(groups) == 1:
        return (OutputShard(f"{stem}.safetensors", metadata, _aligned(groups[0])),), None
    return tuple(
        OutputShard(f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors", metadata, _aligned(group))
        for number, group in enumerate(groups, 1)
    ), stem + INDEX_SUFFIX


def _aligned(items: Iterable[Item]) -> tuple[Item, ...]:
    """The base's order; where dtypes change, by falling element size, so that every tensor stays aligned to its own."""
    found = tuple(items)
    if all(item.dtype == item.base.dtype for item in found):
        return found
    return tuple(sorted(found, key=lambda item: -BITS[item.dtype]))


def _cut(items: Sequence[Item], limit: int) -> list[list[Item]]:
    """Fill shards greedily, in order."""
    groups: list[list[Item]] = [[]]
    room = limit
    for item in items:
        if item.nbytes > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= item.nbytes
    return groups


def _stem(base: Checkpoint) -> str:
    """What the base calls its weight files, without numbers: `model`, usually."""
    name = base.index_name or base.shards[0].filename
    return re.sub(r"-\d{5}-of-\d{5}$", "", name.removesuffix(INDEX_SUFFIX).removesuffix(".safetensors"))


def header_bytes(shard: OutputShard) -> bytes:
    """A safetensors header, length prefix and padding to eight bytes included."""
    entries: dict[str, object] = {"__metadata__": dict(shard.metadata)} if shard.metadata else {}
    position = 0
    for item in shard.items:
        offsets = [position, position + item.nbytes]
        entries[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": offsets}
        position += item.nbytes
    return encode_header(entries)


def encode_header(entries: Mapping[str, object]) -> bytes:
    """Entries as the bytes that open a safetensors file."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_bytes(plan: Plan) -> bytes:
    """The index of a sharded output, in the form that transformers writes."""
    table = {item.name: shard.filename for shard in plan.shards for item in shard.items}
    numel = sum(math.prod(item.shape) for item in plan.items)
    index = {"metadata": {"total_parameters": numel, "total_size": plan.bytes_out}, "weight_map": table}
    return (json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
