"""Read blocks ahead of a device, and finish each block while the device computes the next one."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..plan.item import Item
from ..plan.large_blocks import RING
from ..storage.safetensors import StoredTensor
from .device_buffers import DeviceBuffers
from .precision import TORCH, as_bytes

AHEAD = 2
"""Blocks that are read ahead, each in a thread of its own."""


class BlockMaker(Protocol):
    """Makes a block of an output at once."""

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Return rows of the output from those of the source."""


@runtime_checkable
class SplitMaker(Protocol):
    """Makes a block of an output in two steps, of which the first one does not wait for the device."""

    def begin(self, raw: Tensor, start: int, stop: int) -> Any:
        """Start to compute some rows."""

    def finish(self, begun: Any) -> Tensor:
        """Return the rows that were begun."""


def finished_blocks(item: Item, maker: BlockMaker, buffers: DeviceBuffers) -> Generator[tuple[int, Tensor], None, None]:
    """Yield the first row of each block, and the block in host memory, until the next one is asked for."""
    begun: tuple[int, Any] | None = None
    for start, stop, raw in read_ahead(item.source, item.spans(), buffers):
        if not isinstance(maker, SplitMaker):
            yield start, maker.block(raw, start, stop)
            continue
        before, begun = begun, (start, maker.begin(raw, start, stop))
        if before:
            yield before[0], maker.finish(before[1])
    if begun and isinstance(maker, SplitMaker):
        yield begun[0], maker.finish(begun[1])


def read_ahead(
    stored: StoredTensor, spans: Iterable[tuple[int, int]], buffers: DeviceBuffers
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield blocks of a stored tensor, as `DeviceBuffers.raw` reads them, in a ring of host buffers.

    A block's buffer is read into again when the second block after it has been asked for, and the device has done
    all work of before.
    """
    blocks = list(spans)
    if len(blocks) < 2 or stored.coded or stored.is_view:
        for number, (start, stop) in enumerate(blocks):
            yield start, stop, buffers.raw(stored, start, stop, f"in {number % RING}")
        return
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="read") as pool:
        for number, (start, stop) in enumerate(blocks):
            for further in range(number + len(waiting), min(number + AHEAD + 1, len(blocks))):
                host = _slot(stored, blocks[further], further % RING, buffers)
                first = blocks[further][0]
                waiting.append(pool.submit(_read, stored, first, host, buffers=buffers, after=buffers.mark()))
            yield start, stop, waiting.popleft().result()


def _slot(stored: StoredTensor, block: tuple[int, int], number: int, buffers: DeviceBuffers) -> Tensor:
    """Return the host buffer of a block: its place in the ring."""
    shape = (block[1] - block[0], stored.matrix[1])
    return buffers.scratch(f"in {number}", shape, TORCH[stored.dtype], on_host=True)


def _read(stored: StoredTensor, first: int, host: Tensor, *, buffers: DeviceBuffers, after: Any) -> Tensor:
    """Read a block into its buffer, once the device has done what it had to do before; in a reader's thread."""
    if after:
        after.synchronize()
    offset = stored.start + first * stored.matrix[1] * stored.itemsize
    buffers.reader.read(stored.path, offset, as_bytes(host))
    return host
