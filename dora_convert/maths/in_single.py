"""Bounds of the errors of combining changes in float32 (maths/block_steps.py).

Every element is marked that is nearer to a tie of bfloat16 than its error, or whose vote is nearer to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

SINGLE = 2.0**-24
"""The most that a rounding to float32 changes a number, as a share of it."""


class CombineRule(NamedTuple):
    """The way in which pruned changes become one."""

    weights: Sequence[float]
    majority: str
    """ "total" or "frequency" elects signs; "" adds all changes up."""


class Errors(NamedTuple):
    """The most that float32 may be off by."""

    share: float
    """For the result: this part of its magnitude,"""
    added: Tensor  # (rows, 1), float32
    """and so much more."""
    vote: float
    """For the sum of the changes."""
