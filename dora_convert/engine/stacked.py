"""Merge small weights of one kind together: the rows of several weights are one matrix, as (weights · rows, columns).

Small weights cost more for calls than for numbers. Each product is the one that `MergeMaker` computes, on memory that
is aligned alike, and all other steps work row by row. So every weight has the bytes that it has when merged alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from ..maths.stack import merge_stack
from ..output.finished import TensorResult
from ..output.shards import ShardFiles
from ..plan.alike import StackKind, kind_of
from ..plan.item import Item
from ..storage.reader import block_height
from ..storage.safetensors import StoredTensor
from ..storage.scatter import Place, fill, whole
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
    for kind, weights in alike.items():
        most = min(memory // cost(weights[0]), len(weights))
        if most > 1 and block_height(*kind.matrix) == kind.matrix[0]:
            yield from (weights[first : first + most] for first in range(0, len(weights), most))


def _is_aligned(kind: StackKind) -> bool:
    rows, columns = kind.matrix
    return not any(count % ALIGNED for count in (rows * columns, kind.rank * rows, kind.rank * columns))


def _in_a_block(matrix: tuple[int, int], most: int) -> int:
    """Return the number of weights, of so many at most, that are computed at a time: a block's elements."""
    rows, columns = matrix
    return block_height(rows * most, columns) // rows


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
        stack = self._read(weights)
        result = self._host("out", stack.raw.shape, weights[0].dtype)
        norms = stack.merged_into(result, self.buffers)
        if norms is None:
            return {}
        data = as_bytes(result)
        self.shards.write_whole(weights, data)
        self.advance(len(data))
        before, after = (_pieces(each, len(weights)) for each in (as_bytes(stack.raw), data))
        observe = self.start.observe
        parts = observe.stack(weights, norms if len(norms) else None, self.spool) if observe else repeat(())
        facts = map(TensorResult, map(xxh3_128_hexdigest, before), map(xxh3_128_hexdigest, after), repeat(None), parts)
        return dict(zip((weight.name for weight in weights), facts, strict=True))

    def _host(self, name: str, shape: Sequence[int], dtype: str) -> Tensor:
        return self.buffers.scratch(name, shape, TORCH[dtype], on_host=True)

    def _read(self, weights: Sequence[Item]) -> LoadedStack:
        """Read the weights and their factors, as they are stored."""
        places: list[Iterator[tuple[Path, list[Place]]]] = []

        def matrices(name: str, tensors: Sequence[StoredTensor]) -> Tensor:
            host = self._host(name, (len(tensors), *tensors[0].matrix), tensors[0].dtype)
            places.append(whole(tensors, as_bytes(host)))
            return host

        edits = [weight.edits[0] for weight in weights]
        lows, magnitudes = [edit.low for edit in edits if edit.low], [m for edit in edits if (m := edit.magnitudes)]
        stack = LoadedStack(
            raw=matrices("in", [weight.source for weight in weights]).flatten(0, 1),
            A=matrices("stored A", [low.A for low in lows]),
            B=matrices("stored B", [low.B for low in lows]),
            m=matrices("stored m", [each.m for each in magnitudes]) if magnitudes else None,
            scales=[low.scale for low in lows],
            offsets=[each.offset for each in magnitudes],
        )
        fill(self.buffers.reader, chain.from_iterable(places))
        return stack


@dataclass(frozen=True, kw_only=True)
class LoadedStack:
    """The rows of weights, one weight below the other, and their factors, as they are stored: (weights, …)."""

    raw: Tensor
    A: Tensor
    B: Tensor
    m: Tensor | None
    scales: list[float]
    offsets: list[float]

    def merged_into(self, result: Tensor, buffers: DeviceBuffers) -> Tensor | None:
        """Merge all weights; return their norms, of which LoRAs have none, or None if a result is not finite."""
        count, rank, columns = self.A.shape
        rows, compute = self.B.shape[1], buffers.spec.compute
        together = min(count, _in_a_block((rows, columns), count))
        single = buffers.scratch("single", (together * rows, columns), torch.float32)
        m = self._magnitudes(buffers)
        n = buffers.scratch("n", (count * rows if m is not None else 0,), compute)
        finite = merge_stack(
            raw=self.raw,
            A=self.A,
            B=self.B,
            scales=self.scales,
            m=m,
            n=n,
            scratch=[
                buffers.scratch("work", (together * rows, columns), compute),
                buffers.scratch("A", (together, rank, columns), compute),
                buffers.scratch("B", (together, rows, rank), compute),
                single,
                single.view(torch.int16),
            ],
            out=result,
        )
        return n if finite else None

    def _magnitudes(self, buffers: DeviceBuffers) -> Tensor | None:
        """Return the magnitudes in the compute dtype, (weights · rows); None for LoRAs."""
        if self.m is None:
            return None
        m = buffers.scratch("m", self.m.shape, buffers.spec.compute).copy_(self.m)
        for part, offset in zip(m, self.offsets, strict=True) if any(self.offsets) else ():
            part.add_(offset)
        return m.flatten()


def _pieces(data: memoryview, count: int) -> Iterator[memoryview]:
    """Yield so many equal parts."""
    size = len(data) // count
    return (data[first : first + size] for first in range(0, len(data), size))
