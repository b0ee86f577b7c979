"""Explain why a computed tensor is refused."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..codecs.coded import CodedTensor
from ..errors import NumericalError
from ..plan.item import Item


def refuse_overflow(item: Item, numbers: Iterable[Tensor]) -> None:
    """Raise NumericalError if a new scale of a quantised weight is NaN or Inf: its dtype does not hold it."""
    if all(bool(torch.isfinite(number).all()) for number in numbers):
        return
    assert isinstance(item.source, CodedTensor)
    beside = "; the scale of the whole weight stays the base's" if "global" in item.source.parts else ""
    raise NumericalError(
        f"{item.name}: merged values are too large for {item.source.scheme.title}: a block's scale overflows{beside}.",
        hint="--dequantize-touched writes such weights dense; is the adapter's scaling right?",
    )


def refuse_result(item: Item, raw: Tensor, result: Tensor) -> None:
    """Raise the error that explains a NaN or Inf; a conversion may keep those of its source."""
    if not item.changed and torch.equal(torch.isfinite(result), torch.isfinite(raw)):
        return
    if not torch.isfinite(raw).all():
        owner = "BASE's" if item.source is item.base else "The adapter's"
        raise NumericalError(f"{owner} tensor {item.source.name} holds NaN or Inf.", hint="the file is damaged")
    if torch.isnan(result).any():
        raise NumericalError(
            f"{item.name}: W + sBA has an output whose weights are all zero, so DoRA's m/‖V‖ is undefined.",
            hint="is this the base that the adapter was trained on?",
        )
    raise NumericalError(f"{item.name} overflows {item.dtype}.", hint="--dtype bfloat16 or float32 has the range")
