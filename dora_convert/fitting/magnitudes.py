"""Compute the magnitudes that make a DoRA of a LoRA."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.device_buffers import DeviceBuffers
from ..engine.factors import LoadedEdit
from ..engine.tensor import SourceValues
from ..errors import NumericalError
from ..maths import lora as maths
from .jobs import MatchedChange
from .run import Fitted


def magnitudes(job: MatchedChange, buffers: DeviceBuffers, *, preserve: bool) -> Fitted:
    """Return m = ‖W + sBA‖ (2), or ‖W‖ without `preserve`, from blocks of rows; stored in float32.

    Raises NumericalError if an output's norm is zero: DoRA's m/n is then undefined.
    """
    edit, spans = job.edit, list(job.item.spans())
    operand, values = LoadedEdit.load(edit, buffers), SourceValues(job.item, buffers)
    assert operand.factors
    gram = operand.factors.right(0)
    gram = gram @ gram.T
    blocks: list[tuple[Tensor, Tensor]] = []  # m and n
    size = 0.0
    for start, stop in spans:
        W = values.block(buffers.raw(job.item.source, start, stop), start, stop)
        before = W if preserve else maths.norms(W, edit.axis)
        after = maths.norms(operand.add_(W, start, stop), edit.axis)
        blocks = _gathered(blocks, after if preserve else before, after, edit.axis)
        left = operand.factors.left(start, stop)
        size += float((left @ gram * left).sum())
    m, n = (torch.cat(norms) for norms in zip(*blocks, strict=True))
    if zeros := int((n == 0).sum()):
        raise NumericalError(
            f"{job.name}: W + sBA has {zeros} outputs whose weights are all zero, so DoRA's m/‖V‖ is undefined.",
            hint="--exclude leaves the module out",
        )
    assert edit.low
    stored = m.to("cpu", torch.float32)
    lost = float(((stored.double() / n.cpu().double() - 1) * n.cpu().double()).square().sum())
    change = edit.low.scale * edit.low.scale * max(size, 0.0)  # a power raises where a product is inf
    shape = (1, -1, *[1] * (len(edit.low.A.shape) - 2)) if len(edit.low.A.shape) > 2 else (-1,)
    facts = {"rank": edit.low.rank, "change": change, "lost": lost}
    return Fitted({"m": stored.view(shape)}, facts)


def _gathered(blocks: list[tuple[Tensor, Tensor]], m: Tensor, n: Tensor, axis: int) -> list[tuple[Tensor, Tensor]]:
    """Return the norms with one more block's: appended along rows, added up along columns."""
    if axis == 1 or not blocks:
        return [*blocks, (m, n)]
    return [(blocks[0][0].hypot(m), blocks[0][1].hypot(n))]
