"""Merge small weights of one kind together: the rows of several weights are one block, as (weights · rows, columns).

Small weights cost more for calls than for numbers. Each product is the one that `MergeMaker` computes, on memory that
is aligned alike, and all other steps work row by row. So every weight has the bytes that it has when merged alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

from torch import Tensor
from xxhash import xxh3_128_hexdigest

from ..maths import lora as maths
from ..output.finished import TensorResult
from ..output.shards import ShardFiles
from ..plan.alike import StackKind, kind_of
from ..plan.item import Item
from ..storage.reader import block_height
from ..storage.safetensors import StoredTensor
from ..storage.spool import Spool
from .device_buffers import DeviceBuffers
from .precision import TORCH, as_bytes
from .tensor import MergeStart

ALIGNED = 16
"""Elements: a product's bits may depend on how its operands are aligned, and torch aligns tensors by 64 bytes."""


def stacks(items: Sequence[Item], memory: int, cost: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yield weights that are merged together, within so many bytes; weights that must be alone are left out."""
    alike: dict[StackKind, list[Item]] = defaultdict(list)
    for item in items:
        if (kind := kind_of(item)) and _is_aligned(kind):
            alike[kind].append(item)
    for (matrix, *_), weights in alike.items():
        rows, columns = matrix
        most = min(block_height(rows * len(weights), columns) // rows, memory // cost(weights[0]))
        if most > 1:
            yield from (weights[first : first + most] for first in range(0, len(weights), most))


def _is_aligned(kind: StackKind) -> bool:
    rows, columns = kind.matrix
    return not any(count % ALIGNED for count in (rows * columns, kind.rank * rows, kind.rank * columns))


@dataclass(frozen=True, kw_only=True)
class StackedMerge:
    """Merges stacks with one worker's buffers."""

    start: MergeStart
    buffers: DeviceBuffers
    shards: ShardFiles
    spool: Spool
    advance: Callable[[int], None]

    def results(self, weights: Sequence[Item]) -> dict[str, TensorResult]:
        """Write the weights of a stack; return the facts by name, or nothing if a result is not finite."""
        raw = self._read("in", [weight.source for weight in weights])
        W = self.buffers.lift(raw)
        norms = self._apply_(W, weights)
        result = self.buffers.land(W, TORCH[weights[0].dtype])
        if not maths.all_finite(result) or (norms is not None and not maths.all_finite(norms)):
            return {}
        before, after = (list(_pieces(as_bytes(rows), len(weights))) for rows in (raw, result))
        for weight, data in zip(weights, after, strict=True):
            self.shards.write(weight, 0, data)
            self.advance(len(data))
        observe = self.start.observe
        parts = observe.stack(weights, norms, self.spool) if observe else repeat(())
        facts = map(TensorResult, map(xxh3_128_hexdigest, before), map(xxh3_128_hexdigest, after), repeat(None), parts)
        return dict(zip((weight.name for weight in weights), facts, strict=True))

    def _read(self, buffer: str, tensors: Sequence[StoredTensor]) -> Tensor:
        """Read matrices of one shape, one below the other, in the stored dtype: (tensors · rows, columns)."""
        rows, columns = tensors[0].matrix
        host = self.buffers.scratch(buffer, (len(tensors) * rows, columns), TORCH[tensors[0].dtype], on_host=True)
        for tensor, data in zip(tensors, _pieces(as_bytes(host), len(tensors)), strict=True):
            self.buffers.reader.read(tensor.path, tensor.start, data)
        return host

    def _factors(self, buffer: str, tensors: Sequence[StoredTensor]) -> Tensor:
        """Read matrices of one shape in the compute dtype: (tensors, rows, columns)."""
        host = self._read("factor", tensors)
        on_device = self.buffers.scratch(buffer, host.shape, self.buffers.spec.compute).copy_(host)
        return on_device.view(len(tensors), -1, host.shape[1])

    def _apply_(self, W: Tensor, weights: Sequence[Item]) -> Tensor | None:
        """Compute W + s·BA of each weight, or m·(W + s·BA)/n, in place; return n, if there is one."""
        lows = [low for weight in weights if (low := weight.edits[0].low)]
        A, B = self._factors("A", [low.A for low in lows]), self._factors("B", [low.B for low in lows])
        for part, left, right, low in zip(W.view(len(lows), -1, W.shape[1]), B, A, lows, strict=True):
            maths.add_low_rank_(part, left, right, low.scale)
        magnitudes = [each for weight in weights if (each := weight.edits[0].magnitudes)]
        if not magnitudes:
            return None
        m, n = self._factors("m", [each.m for each in magnitudes]), maths.norms(W, axis=1)
        for part, each in zip(m, magnitudes, strict=True):
            if each.offset:
                part.add_(each.offset)
        maths.rescale_(W, m.flatten(), n, 1)
        return n


def _pieces(data: memoryview, count: int) -> Iterator[memoryview]:
    """Yield so many equal parts."""
    size = len(data) // count
    return (data[first : first + size] for first in range(0, len(data), size))
