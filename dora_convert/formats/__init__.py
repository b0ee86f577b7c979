"""Adapter file formats, one module each, tried in this order.

A format is a module with two functions: `recognises(path) -> bool` by names alone, and `read(source, accepted) -> Adapter` from
headers. Adding one is a file and a line here.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from ..adapter import Adapter
from ..refs import Source
from . import peft


class Format(Protocol):
    """What a format module provides."""

    def recognises(self, path: Path) -> bool:
        """Whether the folder looks like this format."""

    def read(self, source: Source, accepted: Collection[str] = ()) -> Adapter:
        """The adapter, from headers; `accepted` names config fields that are not to be refused."""


FORMATS: tuple[Format, ...] = (peft,)
