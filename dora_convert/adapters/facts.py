"""Compute scalings with what a caller knows about an adapter and no file of the adapter says."""

from __future__ import annotations

from math import isfinite

from ..errors import UnsupportedError
from ..settings import AdapterFacts


class Scaling:
    """Computes s = alpha/r for files that lack alpha, with the caller's words."""

    def __init__(self, facts: AdapterFacts, tool: str, default: str, *, alpha: bool = True) -> None:
        """`default` says, for the message that asks, the tool's own default; without `alpha`, s itself is asked for."""
        self._asks = "alpha" if alpha else "the scaling"
        self._facts, self._tool, self._default = facts, tool, default

    def of(self, rank: int, alpha: float | None = None, *, by_rank: bool = True) -> tuple[float, str]:
        """Return s and its rule; without `by_rank`, s is alpha itself.

        Raises UnsupportedError, with the option to type, if neither a file nor the caller says alpha.
        """
        if (scaling := self._facts.scaling) is not None:
            return scaling, f"{scaling:g} (--scaling)" if isfinite(scaling) else "not in the files"
        word = "" if self._facts.alpha is None else " (--alpha)"
        alpha = alpha if self._facts.alpha is None else self._facts.alpha
        if alpha is None:
            raise UnsupportedError(f"{self._tool} does not store {self._asks} in its files.", hint=self._hint())
        return (alpha / rank, f"alpha {alpha:g}{word} / rank {rank}") if by_rank else (alpha, f"alpha {alpha:g}{word}")

    def _hint(self) -> str:
        default = f"as in training ({self._tool}'s default: {self._default})"
        return f"--alpha A {default}, or --scaling S" if self._asks == "alpha" else f"--scaling S {default}"
