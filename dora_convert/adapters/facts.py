"""Compute scalings with what a caller knows about an adapter and no file of the adapter says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import isfinite

from ..errors import UnsupportedError, UsageError
from ..settings import AdapterFacts
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor
from . import Change, Decomposed, LowRank


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


class ScalingOrOne:
    """Computes s for a tool that never stores alpha, and whose s is mostly 1: as the caller says, else 1."""

    def __init__(self, facts: AdapterFacts) -> None:
        known = facts.scaling is None or isfinite(facts.scaling)  # NaN stands for a file that is only described
        self._given = [name for name in ("alpha", "scaling") if known and getattr(facts, name) is not None]
        self._facts, self._used = facts, False
        self.assumed = False
        """True if a module got 1, as nobody says otherwise."""

    def of(self, rank: int) -> tuple[float, str]:
        """Return s and its rule."""
        if not self._given:
            self.assumed = True
            return 1.0, "no alpha: 1"
        self._used = True
        return Scaling(self._facts, "", "").of(rank)

    def warnings(self, source: Source) -> tuple[str, ...]:
        """Return a warning if a scaling is assumed."""
        said = "has no alpha, as all files of ai-toolkit's DoRA: the scaling is taken as 1; --alpha A says otherwise"
        return (f"{source.name} {said}",) if self.assumed else ()

    def refuse_needless(self) -> None:
        """Raise UsageError if the caller says alpha, and every module has its own."""
        if self._given and not self._used:
            raise UsageError(
                f"--{self._given[0]} is for modules that lack alpha; those of this file have it, or need none."
            )


def scaled_outside(target: str, low: LowRank, m: StoredTensor, rule: str) -> Iterator[Change]:
    """Yield the changes of ai-toolkit's DoRA: (m/‖W + BA‖)·(W + BA) + (s − 1)·BA, with s outside of the norm."""
    yield Change(target, Decomposed(replace(low, scale=1.0), m), rule=rule)
    if low.scale != 1:
        yield Change(target, replace(low, scale=low.scale - 1), rule=f"{rule}, less 1, beside the DoRA", beside=True)
