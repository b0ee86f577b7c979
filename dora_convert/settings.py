"""Say how to run a plan: the choices of a caller that do not change the output."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from typing_extensions import Self

from .errors import UsageError
from .options import ComputeOptions
from .sizes import format_size, parse_size

MOST_WORKERS = 8
MAX_MEMORY = "160MiB"
"""Bytes that streaming verbs hold at once by default."""
REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

Value = TypeVar("Value")


@dataclass(kw_only=True)
class Settings:
    """Device, memory, and callbacks."""

    device: str
    compute_dtype: str = "auto"
    max_memory: int
    workers: int
    verify: bool = True
    base_model: str | None = None
    on_progress: Callable[[int, int], None] | None = None
    on_notice: Callable[[str], None] | None = None
    started: float = field(default_factory=time.monotonic)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_base_model(self.base_model)

    @classmethod
    def parse(
        cls,
        options: ComputeOptions,
        max_memory: str | int = MAX_MEMORY,
        *,
        compute_dtype: str = "auto",
        verify: bool = True,
        base_model: str | None = None,
    ) -> Self:
        """Return a caller's choices, checked; UsageError for an invalid device, size or repo id."""
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", options["device"]):
            raise UsageError(f"--device {options['device']!r} is not one of auto, cpu, cuda, cuda:N, mps.")
        return cls(
            device=options["device"],
            compute_dtype=compute_dtype,
            max_memory=parse_size(max_memory, "--max-memory"),
            workers=options["workers"] or default_workers(),
            verify=verify,
            base_model=base_model,
            on_progress=options["on_progress"],
            on_notice=options["on_notice"],
        )

    def check_memory(self, least: int) -> None:
        """Raise UsageError if the budget is below `least`, the bytes of the costliest piece of work."""
        if least > self.max_memory:
            raise UsageError(
                f"--max-memory {format_size(self.max_memory)} does not hold one block of the largest module.",
                hint=f"--max-memory {-(-least // 2**20)}MiB is the least",
            )

    def notify(self, text: str) -> None:
        """Pass a notice to the caller."""
        if self.on_notice:
            self.on_notice(text)

    def warn(self, text: str) -> None:
        """Pass a warning to the caller, and keep it for the report."""
        self.warnings.append(text)
        self.notify(f"warning: {text}")


def check_base_model(repo: str | None) -> None:
    """Raise UsageError if --base-model is not a repo id: model cards name no paths."""
    if repo is not None and not REPO_ID.fullmatch(repo):
        raise UsageError(f"--base-model {repo!r} is not a valid repo id.", hint="write it as org/name")


def parse_choice(name: str, choices: Mapping[str, Value], option: str) -> Value:
    """Return the value of a choice by its name; UsageError lists all names."""
    if name not in choices:
        raise UsageError(f"{option} {name!r} is not one of {', '.join(choices)}.")
    return choices[name]


def default_workers() -> int:
    """Return the number of processors that this process may use, at least two and at most eight."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(2, min(count, MOST_WORKERS))
