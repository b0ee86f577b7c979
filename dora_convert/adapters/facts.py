"""Hold what a caller knows about an adapter and no file of the adapter says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct

from ..errors import UnsupportedError, UsageError
from ..storage.json_files import Real, checked

NAMES = ("alpha", "scaling", "axis", "enable_lora")


class Facts(Struct, frozen=True, omit_defaults=True):
    """The caller's facts about adapters; each counts for the adapters whose files lack it."""

    alpha: Real | None = None
    scaling: Real | None = None
    """s itself, instead of a rule with alpha."""
    axis: Literal["rows", "columns"] | None = None
    """The side along which magnitudes lie."""
    enable_lora: tuple[bool, ...] = ()
    """For each equal block of outputs, True if it has factors (loralib's MergedLinear)."""

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the facts that are given."""
        return tuple(name for name in NAMES if getattr(self, name) not in (None, ()))


NO_FACTS = Facts()


def parse_facts(given: Mapping[str, Any]) -> Facts | None:
    """Return the facts among a verb's options; None if none is given. Raises UsageError for invalid ones."""
    facts = {name: given.get(name) for name in NAMES if given.get(name) not in (None, ())}
    if not facts:
        return None
    if isinstance(words := facts.get("enable_lora"), str):
        facts["enable_lora"] = [{"true": True, "false": False}.get(word, word) for word in words.lower().split(",")]
    try:
        parsed = checked(facts, Facts, "the options --alpha, --scaling, --axis and --enable-lora")
    except Exception as error:
        raise UsageError(f"{error}") from error
    if parsed.enable_lora and not any(parsed.enable_lora):
        raise UsageError("--enable-lora has no true.", hint="--enable-lora true,false,true")
    return parsed


class Scaling:
    """Computes s = alpha/r for files that lack alpha, with the caller's words."""

    def __init__(self, facts: Facts | None, tool: str, default: str) -> None:
        """`default` says, for the message that asks for alpha, the tool's own default."""
        self._facts, self._tool, self._default = facts or NO_FACTS, tool, default

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
