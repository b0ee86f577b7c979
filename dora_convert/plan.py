"""The plan: every output tensor exactly once, and every adapter tensor accounted for.

A plan is data. `planner.make_plan` builds it from headers and options; `execute.run` carries it out; reports print it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash

from .adapter import Adapter
from .blocks import block_height
from .checkpoint import Checkpoint
from .slots import Slot
from .stored import BITS, Stored
from .updates import Decomposed, LowRank, low_rank


@dataclass(frozen=True)
class Options:
    """What a caller may choose that changes the output."""

    dtype: str | None = None
    """The safetensors dtype of every floating tensor, or None: each keeps its own."""
    compute_dtype: str = "F64"
    max_shard_size: int | None = None
    undo: str = "norms"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_unmatched: bool = False


@dataclass(frozen=True)
class Edit:
    """One low-rank or decomposed update in its place, and the strength it is applied at."""

    update: LowRank | Decomposed
    slot: Slot
    weight: float = 1.0

    @property
    def axis(self) -> int:
        """The axis of the stored matrix that a magnitude's norm runs along."""
        return 0 if self.slot.transposed else 1

    @property
    def two_passes(self) -> bool:
        """Whether norms need the whole tensor before its first row can be written."""
        return isinstance(self.update, Decomposed) and self.axis == 0


@dataclass(frozen=True)
class Item:
    """One output tensor and what it is made from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: Stored
    """The base's tensor of that name."""
    source: Stored
    """Where the values start: the base's tensor, or the adapter's that replaces it."""
    edits: tuple[Edit, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def replaced(self) -> bool:
        """Whether the values come from the adapter."""
        return self.source is not self.base

    @property
    def fate(self) -> str:
        """What happens to the tensor: merged, replaced, converted or copied."""
        if self.edits:
            return "merged"
        if self.replaced:
            return "replaced"
        return "copied" if self.dtype == self.base.dtype else "converted"

    @property
    def changed(self) -> bool:
        """Whether an adapter has a part in it."""
        return self.fate in ("merged", "replaced")


@dataclass(frozen=True)
class OutputShard:
    """One output file: its name, header metadata and tensors in order."""

    filename: str
    metadata: Mapping[str, str]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: an adapter tensor, its fate, the output tensors it went into, and why."""

    tensor: str
    fate: str  # merged | replaced | ignored | unmatched
    into: tuple[str, ...] = ()
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The entry as reports and receipts hold it."""
        return {"tensor": self.tensor, "fate": self.fate, "into": list(self.into), "why": self.why}


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know, decided."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    options: Options
    shards: tuple[OutputShard, ...]
    index_name: str | None
    ledger: tuple[Entry, ...]

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """Every output tensor, shard after shard."""
        return tuple(item for shard in self.shards for item in shard.items)

    @property
    def bytes_out(self) -> int:
        """Bytes of all output tensors."""
        return sum(item.nbytes for item in self.items)

    @cached_property
    def memory(self) -> int:
        """Bytes that the costliest item holds at once: the least a memory budget can be."""
        return max(cost(item, self.options) for item in self.items)

    @property
    def undo_bytes(self) -> int:
        """The most that the undo record's tensors can take."""
        return 0 if self.options.undo == "none" else sum(undo_bytes(item) for item in self.items)

    def counts(self) -> dict[str, int]:
        """How many tensors met which fate; converted ones count as copied, too."""
        fates = [item.fate for item in self.items]
        return {
            "total": len(fates),
            "merged": fates.count("merged"),
            "replaced": fates.count("replaced"),
            "added": 0,
            "copied": fates.count("copied") + fates.count("converted"),
            "converted": fates.count("converted"),
        }

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of the plan's description."""
        return xxhash.xxh3_128_hexdigest("\n".join(self.describe()).encode())

    def describe(self) -> Iterator[str]:
        """The plan as canonical JSON lines, without paths: equal plans give equal lines."""
        yield json.dumps([self.options.compute_dtype, self.options.undo, self.index_name])
        for shard in self.shards:
            yield json.dumps([shard.filename, dict(shard.metadata)])
            for item in shard.items:
                edits = [_describe_edit(edit) for edit in item.edits]
                yield json.dumps([item.name, item.dtype, item.shape, item.source.name, item.replaced, edits])


def _describe_edit(edit: Edit) -> list[Any]:
    low = low_rank(edit.update)
    kind = type(edit.update).__name__
    return [kind, low.A.name, low.B.name, low.rank, low.scale, edit.slot.transposed, edit.weight]


COMPUTE_BYTES = {"F64": 8, "F32": 4}


def cost(item: Item, options: Options) -> int:
    """Bytes a worker holds while it makes one item: buffers for a block, and factors for the whole of it.

    Copies need no buffer worth counting.
    """
    if item.fate == "copied":
        return 0
    width = COMPUTE_BYTES[options.compute_dtype]
    columns = item.source.matrix[1]
    block = block_height(item.source) * columns
    host = block * max(item.source.itemsize, item.base.itemsize, BITS[item.dtype] // 8)
    total = host + block * (width + 4) + (host + 8 * block if item.replaced else 0)
    if len(item.edits) > 1:
        total += 2 * block * width
    for edit in item.edits:
        low = low_rank(edit.update)
        outputs, inputs = low.B.numel // low.rank, low.A.numel // low.rank
        whole, sliced = (outputs, inputs) if edit.slot.transposed else (inputs, outputs)
        height = min(block_height(item.source), sliced)
        total += low.rank * (whole * width + height * (width + low.B.itemsize))
        if isinstance(edit.update, Decomposed):
            total += outputs * (3 * width + 4)
    return total


def undo_bytes(item: Item) -> int:
    """The most that undoing one item can need: a norm per DoRA row, the base's rows where it was replaced."""
    norms = sum(
        4 * low_rank(edit.update).B.shape[0] for edit in item.edits if isinstance(edit.update, Decomposed)
    )
    return norms + (item.base.nbytes + 8 * item.base.matrix[0] if item.replaced else 0)
