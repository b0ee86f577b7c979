"""Compute the magnitudes that make a DoRA of a LoRA."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import low_rank
from ..engine.device_buffers import DeviceBuffers
from ..engine.factors import LoadedEdit
from ..engine.tensor import SourceValues
from ..errors import NumericalError
from ..maths import lora as maths
from ..plan.item import Edit, Item
from .jobs import MatchedChange
from .run import Fitted


def magnitudes(job: MatchedChange, buffers: DeviceBuffers, *, preserve: bool) -> Fitted:
    """Return m = ‖W + sBA‖ (2), or ‖W‖ without `preserve`, from blocks of rows; stored in float32.

    Raises NumericalError if an output's norm is zero: DoRA's m/n is then undefined.
    """
    low = low_rank(job.change.update)
    assert low
    m, n, size = torch.empty(0), torch.empty(0), 0.0
    for number, (item, edit) in enumerate(job.parts):
        own_m, own_n, own_size = _of_part(item, edit, buffers, preserve=preserve)
        if not job.is_cut:
            m, n = own_m, own_n
        else:
            m, n = (each if len(each) else own_m.new_empty(low.outputs) for each in (m, n))
            m[job.outputs(number)], n[job.outputs(number)] = own_m, own_n
        size += own_size
    if zeros := int((n == 0).sum()):
        raise NumericalError(
            f"{job.name}: W + sBA has {zeros} outputs whose weights are all zero, so DoRA's m/‖V‖ is undefined.",
            hint="--exclude leaves the module out",
        )
    stored = m.to("cpu", torch.float32)
    lost = float(((stored.double() / n.cpu().double() - 1) * n.cpu().double()).square().sum())
    change = low.scale * low.scale * max(size, 0.0)  # a power raises where a product is inf
    shape = (1, -1, *[1] * (len(low.A.shape) - 2)) if len(low.A.shape) > 2 else (-1,)
    facts = {"rank": low.rank, "change": change, "lost": lost}
    return Fitted({"m": stored.view(shape)}, facts)


def _of_part(item: Item, edit: Edit, buffers: DeviceBuffers, *, preserve: bool) -> tuple[Tensor, Tensor, float]:
    """Return m, ‖W + sBA‖ and ‖BA‖² of the outputs that one stored tensor holds."""
    operand, values = LoadedEdit.load(edit, buffers), SourceValues(item, buffers)
    assert operand.factors
    gram = operand.factors.right(0)
    gram = gram @ gram.T
    blocks: list[tuple[Tensor, Tensor]] = []  # m and n
    size = 0.0
    for start, stop in item.spans():
        W = values.block(buffers.raw(item.source, start, stop), start, stop)
        before = W if preserve else maths.norms(operand.own(W, start, stop), edit.axis)
        after = maths.norms(operand.own(operand.add_(W, start, stop), start, stop), edit.axis)
        blocks = _gathered(blocks, after if preserve else before, after, edit.axis)
        left = operand.factors.left(*operand.numbers(start, stop))
        size += float((left @ gram * left).sum())
    m, n = (torch.cat(norms) for norms in zip(*blocks, strict=True))
    return m, n, size


def _gathered(blocks: list[tuple[Tensor, Tensor]], m: Tensor, n: Tensor, axis: int) -> list[tuple[Tensor, Tensor]]:
    """Return the norms with one more block's: appended along rows, added up along columns."""
    if axis == 1 or not blocks:
        return [*blocks, (m, n)]
    return [(blocks[0][0].hypot(m), blocks[0][1].hypot(n))]
