"""Declare records, frozen dataclasses of which a plan makes hundreds of thousands, and what they keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

__all__ = ["kept", "record"]

if TYPE_CHECKING:
    from dataclasses import dataclass as record
    from functools import cached_property as kept
else:

    class kept:  # noqa: N801 - used as `property` is
        """A property that is computed once for each record.

        `functools.cached_property` takes a lock before Python 3.12, which costs more than most of these values.
        """

        def __init__(self, compute: Any) -> None:
            self._compute, self.__doc__ = compute, compute.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, record: Any, owner: type | None = None) -> Any:
            if record is None:
                return self
            value = vars(record)[self._name] = self._compute(record)
            return value

    def record(*, frozen: bool, slots: bool = False) -> Any:
        """Return a decorator as `dataclass` does, whose classes the type checker alone keeps frozen.

        A frozen dataclass sets each field through a call of `object.__setattr__`, which takes three times as long.
        """
        return dataclass(unsafe_hash=frozen, slots=slots)
