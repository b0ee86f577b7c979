"""Say what a worker asks of those that compute one tensor, and of those that watch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from ..output.finished import TensorResult
from ..plan.item import Item
from ..storage.reader import Digest
from ..storage.spool import Spool, SpooledTensor
from .device_buffers import Begun, DeviceBuffers
from .factors import LoadedEdit


class TensorMaker(Protocol):
    """Turns blocks of a source tensor into blocks of an output tensor."""

    proves_output: bool
    """True if the sha256 of the written bytes is needed."""

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Return rows of the output, in host memory, from the same rows of the source."""

    def rest(self) -> Iterable[tuple[int, memoryview]]:
        """Yield the output's rows beyond the source's last one: each block's first row, and its bytes."""

    def result(self, written: Digest) -> TensorResult:
        """Return the facts about the finished tensor, whose written bytes have these hashes."""


StartMaker = Callable[[Item, DeviceBuffers, Spool], TensorMaker]
"""Starts the maker of one item; called in the worker that computes the item."""


class MergeObserver(Protocol):
    """Sees every block of one tensor during the merge, and keeps what undoing the merge needs."""

    def before(self, base: Tensor, W: Tensor, start: int, stop: int) -> None:
        """See some rows before the edits: the base's bytes, and the values that the edits start from."""

    def after(self, begun: Begun, result: Tensor) -> None:
        """See some rows after the edits: the source's bytes, each edit's norms, and the output's bytes."""

    def beyond(self, base: memoryview, start: int, stop: int) -> None:
        """See rows of the base that the output has no place for."""

    def parts(self) -> tuple[SpooledTensor, ...]:
        """Return the tensors of the undo record."""


Taken = tuple[Tensor, Tensor] | None
"""Factors of the part of a weight that training began without, oriented as the weight is stored."""


class Observe(Protocol):
    """Starts the observers of a merge."""

    def __call__(
        self, item: Item, edits: Sequence[LoadedEdit], taken: Taken, buffers: DeviceBuffers, spool: Spool
    ) -> MergeObserver | None:
        """Start the observer of one item; None if nothing of the item must be kept."""

    def stack(self, weights: Sequence[Item], norms: Tensor | None, spool: Spool) -> Sequence[tuple[SpooledTensor, ...]]:
        """Return the tensors of the undo record of weights that are merged together; their norms are one tensor."""
