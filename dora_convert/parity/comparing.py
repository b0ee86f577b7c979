"""Compare planned tensors with those of a merged checkpoint, one at a time, wherever the comparison runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ..codecs.coded import CodedTensor
from ..engine.precision import ComputeSpec, exact_arithmetic
from ..plan.item import Item
from ..reports.verify import CheckedModule
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .combined import expected_of
from .recoded import compare_coded
from .self_check import ARRAYS
from .stacks import read_ahead
from .tensor import FEWEST_ELEMENTS, MOST_ELEMENTS, ON_DEVICE, Outputs, compare_all

AHEAD_BYTES = 256 << 20
"""Larger tensors are not read ahead: they may not fit into the system's cache beside others."""


@dataclass(frozen=True)
class Comparing:
    """The pairs of planned and written tensors, and the number of sample inputs of each; data for any worker."""

    pairs: Sequence[tuple[Item, StoredTensor]]
    samples: int
    spec: ComputeSpec
    memory: int = 0
    """A worker's share of the memory budget."""

    def start(self) -> Callable[[Iterable[int]], list[CheckedModule | bool]]:
        """Return the function that compares some pairs, by their numbers, on a node of a cluster."""
        torch.set_num_threads(1)
        reader = Reader()

        def compare(numbers: Iterable[int]) -> list[CheckedModule | bool]:
            with exact_arithmetic():
                return [self.one(number, reader, self.spec.device, lambda _: nullcontext()) for number in numbers]

        return compare

    def one(
        self, number: int, reader: Reader, device: torch.device, holding: Callable[[int], AbstractContextManager[None]]
    ) -> CheckedModule | bool:
        """Compare a pair: return the report of a changed tensor, and of others True if they are the base's.

        `holding` waits for so many bytes of the memory budget.
        """
        item, written = self.pairs[number]
        if written.coded and (item.source.coded or item.changed):
            with holding(item.cost(8)):
                return _compare_coded(item, written, reader, self.samples, device)
        if item.verbatim and item.source.dtype == written.dtype:
            return reader.same_bytes(item.source, written)
        elements = self._elements(item, device)
        with holding(item.cost(8) + 8 * ARRAYS * (elements - FEWEST_ELEMENTS)):
            module = compare_all(item, written, reader, self.samples, device, elements=elements)
        return module if item.changed else not module.wrong_elements

    def read_ahead(self, number: int, reader: Reader) -> None:
        """Ask the system to read a pair that is compared soon; a merge leaves its output on the disk alone."""
        for tensor in (self.pairs[number][0].source, self.pairs[number][1]):
            if not (tensor.coded or tensor.is_view or tensor.nbytes > AHEAD_BYTES):
                read_ahead(reader, tensor)

    def _elements(self, item: Item, device: torch.device) -> int:
        """Return the number of elements that are compared together; an item's cost covers the fewest."""
        if device.type != "cpu":
            return ON_DEVICE
        return max(FEWEST_ELEMENTS, min(MOST_ELEMENTS, (self.memory - item.cost(8)) // (8 * ARRAYS)))


def _compare_coded(
    item: Item, written: StoredTensor, reader: Reader, samples: int, device: torch.device
) -> CheckedModule | bool:
    """Compare every element of a coded weight; of one that no adapter touched return True if its parts are the base's.

    An adapter's weight may lie anywhere within half a step of its codes, and its parts as well.
    """
    source = item.source
    if not item.changed and isinstance(source, CodedTensor) and isinstance(written, CodedTensor):
        pairs = [(part, written.parts.get(role)) for role, part in source.parts.items()]
        return all(other is not None and reader.same_bytes(part, other) for part, other in pairs)
    expected = expected_of(item, reader, device)
    outputs = Outputs(expected, samples if len(item.shape) > 1 else 0, device)
    verdict = compare_coded(written, expected, range(item.matrix[0]), reader, outputs)
    error, floor = outputs.relative()
    return CheckedModule(
        name=item.name,
        elements=written.numel,
        wrong_elements=verdict.wrong,
        max_ulp=verdict.max_ulp,
        output_error=error,
        output_floor=floor,
        cause=None,
    )
