"""Read weights for edits that need more than a block: a bias that is scaled as its weight, and whole rotations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from ..plan.item import Item
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit


class Values(Protocol):
    """The values that edits start from."""

    def block(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Return a block in the compute dtype from its raw rows."""


def prepare(item: Item, operands: Iterable[LoadedEdit], values: Values, buffers: DeviceBuffers) -> None:
    """Show the whole tensor to updates that need it, and give biases the norms of their weights."""

    def read(start: int, stop: int) -> Tensor:
        return values.block(buffers.raw(item.source, start, stop), start, stop)

    for operand in operands:
        if operand.edit.follows and operand.edit.divides:
            operand.n.append(norms_of(operand.edit.follows, buffers))
        if operand.transform and operand.transform.needs_whole:
            operand.hold(item.spans(), read)


def norms_of(item: Item, buffers: DeviceBuffers) -> Tensor:
    """Return the norms of a weight with one edit: one for each output. The weight is as the base or a file has it."""
    (edit,) = item.edits

    def read(start: int, stop: int) -> Tensor:
        return buffers.lift(buffers.raw(item.source, start, stop))

    operand = LoadedEdit.load(edit, buffers)
    if operand.transform and operand.transform.needs_whole:
        operand.hold(item.spans(), read)
    squares = [operand.measured(read(start, stop), start, stop) for start, stop in item.spans()]
    return (torch.cat(squares) if edit.axis else torch.stack(squares).sum(0)).sqrt()
