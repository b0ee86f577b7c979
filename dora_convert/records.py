"""Declare records: frozen dataclasses of which a plan makes hundreds of thousands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

__all__ = ["record"]

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:

    def record(*, frozen: bool, slots: bool = False) -> Any:
        """Return a decorator as `dataclass` does, whose classes the type checker alone keeps frozen.

        A frozen dataclass sets each field through a call of `object.__setattr__`, which takes three times as long.
        """
        return dataclass(unsafe_hash=frozen, slots=slots)
