"""How to run a plan: what a caller may choose that does not change the output."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import UsageError
from .sizes import format_size, parse_size

MOST_WORKERS = 8
MAX_MEMORY = "160MiB"
"""What verbs that stream hold at once, unless they are told otherwise."""
REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

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
    token: str | None = field(default=None, repr=False, kw_only=True)
    """The Hub's token; None for the one that is logged in."""
    cache: bool = field(default=True, kw_only=True)
    """True if downloads stay in the cache of huggingface_hub."""
    started: float = field(default_factory=time.monotonic)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """UsageError where --base-model is no repo id."""
        check_base_model(self.base_model)

    @classmethod
    def parse(
        cls,
        device: str,
        compute_dtype: str,
        max_memory: str | int,
        workers: int | None,
        *others: Any,
        token: str | None,
        cache: bool,
    ) -> Settings:
        """Check a caller's choices; `others` are the fields up to `on_notice`."""
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
            raise UsageError(f"--device {device!r} is not one of auto, cpu, cuda, cuda:N, mps.")
        held = parse_size(max_memory, "--max-memory")
        return cls(
            device, compute_dtype, held, workers or default_workers(), *others, token=token, cache=cache
        )

    def check_memory(self, least: int) -> None:
        """UsageError where the budget does not hold the costliest piece of work; it names the least that does."""
        if least > self.max_memory:
            raise UsageError(
                f"--max-memory {format_size(self.max_memory)} does not hold one block of the largest module.",
                hint=f"--max-memory {-(-least // 2**20)}MiB is the least",
            )

    def notify(self, text: str) -> None:
        """Tell the caller something."""
        if self.on_notice:
            self.on_notice(text)

    def warn(self, text: str) -> None:
        """Tell the caller something that the report repeats."""
        self.warnings.append(text)
        self.notify(f"warning: {text}")


def check_base_model(given: str | None) -> None:
    """UsageError where --base-model is no repo id: cards name no paths."""
    if given is not None and not REPO_ID.fullmatch(given):
        raise UsageError(f"--base-model {given!r} is no repo id.", hint="it is written org/name")


def chosen(name: str, choices: Mapping[str, Value], option: str) -> Value:
    """One of the values an option may have; UsageError lists them."""
    if name not in choices:
        raise UsageError(f"{option} {name!r} is not one of {', '.join(choices)}.")
    return choices[name]


def default_workers() -> int:
    """One per processor that this process may use, at least two, at most eight."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(2, min(count, MOST_WORKERS))
