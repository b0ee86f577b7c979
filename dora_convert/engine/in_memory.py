"""Compute a plan's tensors one after another and hand them over, instead of writing them.

The bytes are those of a merge: the same makers run in workers of their own, each with one torch thread. Between
two tensors nothing runs, and torch's settings are the caller's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..output.shards import ShardFiles
from ..plan.item import Item
from ..plan.plan import Plan
from ..settings import Settings
from ..storage.checkpoint import Checkpoint, Shard
from ..storage.reader import Reader
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor
from .device_buffers import DeviceBuffers
from .precision import ComputeSpec, as_bytes, empty
from .rehearsal import NoSpool
from .tensor import Combine, MergeMaker, write_tensor
from .workers import WorkerPool

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
"""torch's names of the dtypes of safetensors, for all that a torch tensor of the same shape can hold."""
NOWHERE = Path(os.devnull) / "memory"
"""The folder of tensors in memory; no file can lie there."""


def merged_tensors(
    plan: Plan, settings: Settings, spec: ComputeSpec, reader: Reader | None = None
) -> Iterator[tuple[Item, Tensor]]:
    """Yield every output tensor in the plan's order; as many at once as the memory budget holds, at least one.

    `reader` reads the inputs; None for files.
    """
    if spec.staged:
        from .device_plan import cut_for

        plan = cut_for(plan, spec, settings)
    reader = reader or Reader()
    done = 0
    try:
        for batch in _batches(plan, settings.max_memory):
            pool = WorkerPool(settings.max_memory, DeviceBuffers.dealt(spec, reader), reader.stop)
            tasks = [partial(_compute, item, plan.cost(item), pool) for item in batch]
            results = pool.run(min(settings.workers, len(batch)), tasks)
            for item in batch:
                done += item.nbytes
                if settings.on_progress:
                    settings.on_progress(done, plan.bytes_out)
                yield item, results.pop(0)
    finally:
        reader.close()


def _batches(plan: Plan, most: int) -> Iterator[list[Item]]:
    """Yield the plan's items in their order, in lists of at most so many bytes, or of one item."""
    batch: list[Item] = []
    held = 0
    for item in plan.items:
        if batch and held + item.nbytes > most:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += item.nbytes
    if batch:
        yield batch


def _compute(item: Item, cost: int, pool: WorkerPool[DeviceBuffers], buffers: DeviceBuffers) -> Tensor:
    """Return one output tensor, in host memory of its own."""
    if item.parts or item.part_of:
        raise UnsupportedError(
            f"{item.name} is quantised, and is not coded again in memory.", hint="--dequantize, or merge to a folder"
        )
    host = empty(item.shape, dtype_of(item))
    if item.verbatim:
        buffers.reader.read(item.source.path, item.source.start, as_bytes(host))
        return host
    with pool.holding(cost), buffers.working():
        maker = MergeMaker(item, buffers, NoSpool(), combine=_combine(item))
        write_tensor(item, maker, buffers, _Memory(host), lambda _: pool.check())
    return host


def _combine(item: Item) -> Combine | None:
    """Return what combines edits in another way than a sum; None for a sum."""
    if not item.combination:
        return None
    from .combine import Combiner

    return Combiner


def dtype_of(item: Item) -> torch.dtype:
    """Return torch's dtype of an output tensor; UnsupportedError if torch has none of this shape."""
    found = getattr(torch, DTYPES.get(item.dtype, ""), None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedError(
            f"{item.name} is {item.dtype}, which torch {torch.__version__} does not hold.", hint="merge to a folder"
        )
    return found


class _Memory(ShardFiles):
    """The place of one tensor in memory."""

    def __init__(self, host: Tensor) -> None:
        self._bytes = as_bytes(host)

    def write(self, item: Item, offset: int, data: memoryview) -> None:  # noqa: ARG002 - there is only one
        self._bytes[offset : offset + len(data)] = data


class MemoryReader(Reader):
    """Reads tensors of a state dict as if they lay in files."""

    def __init__(self, tensors: Mapping[Path, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def read(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from `offset` of a tensor's bytes, or of a file."""
        if path not in self._tensors:
            super().read(path, offset, buffer)
            return
        tensor = self._tensors[path].detach().contiguous().flatten()
        first, last = offset // tensor.itemsize, -(-(offset + len(buffer)) // tensor.itemsize)
        part = as_bytes(tensor[first:last].cpu())
        skip = offset - first * tensor.itemsize
        buffer[:] = part[skip : skip + len(buffer)]


def in_memory(
    tensors: Mapping[str, Tensor], config: Mapping[str, object] | None, name: str
) -> tuple[Checkpoint, MemoryReader]:
    """Return a state dict as a checkpoint of one shard, and the reader of its tensors.

    Raises UnsupportedError for a dtype that safetensors does not have.
    """
    names = {getattr(torch, torch_name): name for name, torch_name in DTYPES.items() if hasattr(torch, torch_name)}
    for key, tensor in tensors.items():
        if tensor.dtype not in names:
            raise UnsupportedError(f"{key} is {tensor.dtype}, which no checkpoint holds.")
    stored = tuple(
        StoredTensor(key, names[tensor.dtype], tuple(tensor.shape), NOWHERE / str(number), 0)
        for number, (key, tensor) in enumerate(tensors.items())
    )
    checkpoint = Checkpoint(Source(NOWHERE, name), (Shard(name, {}, stored),), None, config)
    return checkpoint, MemoryReader({each.path: tensors[each.name] for each in stored})
