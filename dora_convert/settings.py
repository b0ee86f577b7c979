"""How to run a plan: what a caller may choose that does not change the output."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from .errors import UsageError
from .stored import CONFIG_DTYPES

DTYPES = {"auto": None} | {name: dtype for dtype, name in CONFIG_DTYPES.items()}
COMPUTE_DTYPES = {"auto": "F64", "float64": "F64", "float32": "F32"}
UNDO = {"norms": "norms", "none": "none"}
MOST_WORKERS = 8

Value = TypeVar("Value")


@dataclass
class Settings:
    """Device, memory, and whom to tell."""

    device: str
    compute_dtype: str
    max_memory: int
    workers: int
    verify: bool
    base_model: str | None
    on_progress: Callable[[int, int], None] | None
    on_notice: Callable[[str], None] | None
    started: float
    warnings: list[str] = field(default_factory=list)

    def notify(self, text: str) -> None:
        """Tell the caller something."""
        if self.on_notice:
            self.on_notice(text)

    def warn(self, text: str) -> None:
        """Tell the caller something that the report repeats."""
        self.warnings.append(text)
        self.notify(f"warning: {text}")


def chosen(name: str, choices: Mapping[str, Value], option: str) -> Value:
    """One of the values an option may have; UsageError lists them."""
    if name not in choices:
        raise UsageError(f"{option} {name!r} is not one of {', '.join(choices)}.")
    return choices[name]


def default_workers() -> int:
    """One per processor that this process may use, at least two, at most eight."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(2, min(count, MOST_WORKERS))
