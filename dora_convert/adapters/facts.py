"""Check what a caller knows about an adapter and no file of the adapter says, and compute scalings with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UnsupportedError, UsageError
from ..settings import AdapterFacts

NAMES = ("alpha", "scaling", "axis", "enable_lora")
SIDES = ("rows", "columns")


def parse_facts(given: Mapping[str, Any]) -> AdapterFacts:
    """Return the facts among a verb's options, or in a receipt; UsageError for invalid ones."""
    axis = given.get("axis")
    if axis not in (None, *SIDES):
        raise UsageError(f"--axis {axis!r} is not one of {', '.join(SIDES)}.")
    numbers = {name: _real(given.get(name), name) for name in ("alpha", "scaling")}
    return AdapterFacts(**numbers, axis=axis, enable_lora=_booleans(given.get("enable_lora")))


def _real(value: object, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"--{name} {value!r} is not a finite number.")
    return float(value)


def _booleans(value: str | Sequence[bool] | None) -> tuple[bool, ...]:
    """Return a list of true and false, which may be one text with commas."""
    words = value.replace(" ", "").lower().split(",") if isinstance(value, str) else list(value or ())
    texts = ["true" if word is True else "false" if word is False else word for word in words]
    if words and (not set(texts) <= {"true", "false"} or "true" not in texts):
        raise UsageError(
            f"--enable-lora {value!r} is not a list of true and false.", hint="such as --enable-lora true,false,true"
        )
    return tuple(text == "true" for text in texts)


class Scaling:
    """Computes s = alpha/r for files that lack alpha, with the caller's words."""

    def __init__(self, facts: AdapterFacts, tool: str, default: str) -> None:
        """`default` says, for the message that asks for alpha, the tool's own default."""
        self._facts, self._tool, self._default = facts, tool, default

    def of(self, rank: int, alpha: float | None = None, *, by_rank: bool = True) -> tuple[float, str]:
        """Return s and its rule; without `by_rank`, s is alpha itself.

        Raises UnsupportedError, with the option to type, if neither a file nor the caller says alpha.
        """
        if (scaling := self._facts.scaling) is not None:
            return scaling, f"{scaling:g} (--scaling)"
        word = "" if self._facts.alpha is None else " (--alpha)"
        alpha = alpha if self._facts.alpha is None else self._facts.alpha
        if alpha is None:
            raise UnsupportedError(
                f"{self._tool} does not store alpha in its files.",
                hint=f"--alpha A as in training ({self._tool}'s default: {self._default}), or --scaling S",
            )
        return (alpha / rank, f"alpha {alpha:g}{word} / rank {rank}") if by_rank else (alpha, f"alpha {alpha:g}{word}")
