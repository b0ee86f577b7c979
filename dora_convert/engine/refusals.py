"""Explain why a computed tensor is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError
from ..plan.item import Item


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
