"""Compute the norms of a weight for the bias that is scaled as the weight is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan.item import Item
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit


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
