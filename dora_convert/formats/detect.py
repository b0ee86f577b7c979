"""Adapter file formats, one module each, tried in this order.

A format is a module with a NAME and the functions of `Format`. Adding one is a file and a line here.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from ..adapters.adapter import Adapter, Change
from ..adapters.new_adapter import Files, NewAdapter
from ..storage.refs import Source
from .peft import read as peft


class Format(Protocol):
    """What a format module provides."""

    NAME: str
    """What `--format` and reports call it."""

    def recognises(self, path: Path) -> bool:
        """Whether the folder looks like this format."""

    def read(self, source: Source, accepted: Collection[str] = ()) -> Adapter:
        """The adapter, from headers; `accepted` names config fields that are not to be refused."""

    def save(self, made: NewAdapter) -> Files:
        """The files of an adapter, from headers: tensors by their names, and what lies beside them."""

    def objection(self, change: Change, tensor: str, like: Adapter) -> str | None:
        """Why an adapter's LoRA on a weight cannot be a DoRA in this format; None where it can."""

    def shares_rank(self, change: Change, tensor: str, like: Adapter) -> str | None:
        """Why an adapter's factors for a weight must keep their rank in this format; None where they need not."""


FORMATS: tuple[Format, ...] = (peft,)
