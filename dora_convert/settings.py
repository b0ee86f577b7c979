"""Say how to read adapters and how to run a plan on this machine: memory, packages, and the version."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typing_extensions import Self

from .errors import UsageError
from .torch_import import without_collections

__version__ = "0.1.0"

MOST_WORKERS = 4
"""More of them by default would wait for each other: Python runs one at a time between two calls of torch."""
MAX_MEMORY = "160MiB"
"""Bytes that streaming verbs hold at once by default."""
DEVICES = re.compile(r"auto|mps|cpu(,cpu)*|cuda(:\d+)?(,(cuda:)?\d+)*")
"""Devices of one kind. One that is named twice has two workers for each worker of one that is named once."""
REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
EXTRAS = {
    "verify": ("transformers", "accelerate", "peft"), "trainer": ("transformers", "peft"), "plot": ("matplotlib",),
    "nf4": ("bitsandbytes",), "ray": ("ray",),
    "s3": ("s3fs",), "gs": ("gcsfs",), "az": ("adlfs",),
}  # fmt: skip
"""The packages of each extra."""
_UNITS = {"": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
}


@dataclass(kw_only=True)
class Settings:
    """Device, memory, and callbacks."""

    device: str
    compute_dtype: str = "auto"
    max_memory: int
    default_memory: bool = False
    """True if the caller has not set the budget."""
    workers: int
    default_workers: bool = False
    """True if the caller has not set the number of workers."""
    verify: bool = False
    base_model: str | None = None
    on_progress: Callable[[int, int], None] | None = None
    on_notice: Callable[[str], None] | None = None
    started: float = field(default_factory=time.monotonic)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """Return the choices among a verb's options; UsageError for an invalid device, size or repo id."""
        device, budget = options["device"], options["max_memory"]
        if not DEVICES.fullmatch(device):
            raise UsageError(f"--device {device!r} is not one of auto, cpu, cuda, cuda:N, cuda:N,M, mps.")
        check_base_model(options.get("base_model"))
        return cls(
            device=device,
            compute_dtype=options.get("compute_dtype", "auto"),
            max_memory=parse_size(MAX_MEMORY if budget in (None, "auto") else budget, "--max-memory"),
            default_memory=budget in (None, "auto"),
            workers=options["workers"] or usual_workers(),
            default_workers=not options["workers"],
            verify=options.get("verify", False),
            base_model=options.get("base_model"),
            on_progress=options["on_progress"],
            on_notice=options["on_notice"],
        )

    @property
    def memory_each(self) -> int:
        """A worker's share of the memory budget."""
        return self.max_memory // self.workers

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
        """Pass a warning to the caller, once, and keep it for the report."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.notify(f"warning: {text}")


@dataclass(frozen=True)
class AdapterFacts:
    """The caller's facts about adapters; each counts for the adapters whose files lack it."""

    alpha: float | None = None
    scaling: float | None = None
    """s itself, instead of a rule with alpha."""
    axis: str | None = None
    """The side along which magnitudes lie: rows or columns."""
    enable_lora: tuple[bool, ...] = ()
    """For each equal block of outputs, True if it has factors (loralib's MergedLinear)."""

    @property
    def given(self) -> dict[str, object]:
        """The facts that are given, by name."""
        return {name: fact for name, fact in vars(self).items() if fact not in (None, ())}


NO_FACTS = AdapterFacts()
SIDES = ("rows", "columns")


def parse_facts(given: Mapping[str, Any]) -> AdapterFacts:
    """Return the facts among a verb's options, or in a receipt; UsageError for invalid ones."""
    axis = given.get("axis")
    if axis not in (None, *SIDES):
        raise UsageError(f"--axis {axis!r} is not one of {', '.join(SIDES)}.")
    numbers = {name: _real(given.get(name), name) for name in ("alpha", "scaling")}
    return AdapterFacts(**numbers, axis=axis, enable_lora=_booleans(given.get("enable_lora")))


def _real(value: object, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"--{name} {value!r} is not a finite number.")
    return float(value)


def _booleans(value: str | Sequence[bool] | None) -> tuple[bool, ...]:
    """Return a list of true and false, which may be one text with commas."""
    words = value.replace(" ", "").lower().split(",") if isinstance(value, str) else list(value or ())
    texts = ["true" if word is True else "false" if word is False else word for word in words]
    if words and (not set(texts) <= {"true", "false"} or "true" not in texts):
        raise UsageError(
            f"--enable-lora {value!r} is not a list of true and false.", hint="such as --enable-lora true,false,true"
        )
    return tuple(text == "true" for text in texts)


@dataclass(frozen=True)
class Waived:
    """The caller's words about adapters: parts that are done without, and facts that no file holds."""

    fields: Collection[str] = ()
    """Config fields that are not refused."""
    files: Collection[str] = ()
    """Files that are left out."""
    facts: AdapterFacts = NO_FACTS


NOTHING = Waived()


def check_base_model(repo: str | None) -> None:
    """Raise UsageError if --base-model is not a repo id: model cards name no paths."""
    if repo is not None and not REPO_ID.fullmatch(repo):
        raise UsageError(f"--base-model {repo!r} is not a valid repo id.", hint="write it as org/name")


def usual_workers() -> int:
    """Return the number of processors that this process may use, at least two and at most four."""
    return max(2, min(processors(), MOST_WORKERS))


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2


def parse_size(text: str | int, option: str) -> int:
    """Return the bytes in a size such as 5GB (powers of ten), 160MiB (powers of two) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", str(text).strip())
    if not match or match[2] not in _UNITS or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise UsageError(f"{option} {text!r} is not a size.", hint=f"{option} 500MB, 5GB or 160MiB")
    return size


def format_size(nbytes: float) -> str:
    """Return a size for reading: three digits and a power of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def peak_memory() -> int | None:
    """Return the most bytes that this process has had in memory; None if the system does not tell."""
    with suppress(OSError):
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(match[1]) * 1024 if match else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def require_extra(extra: str, purpose: str) -> None:
    """Raise UsageError if a package of an extra is missing, with the command that installs it."""
    with without_collections():
        missing = [name for name in EXTRAS[extra] if not _is_installed(name)]
    if missing:
        names = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
        raise UsageError(
            f"{purpose} needs {names}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            hint=f"pip install 'dora-convert[{extra}]'",
        )


def _is_installed(name: str) -> bool:
    """Return True if a package can be imported; a folder of that name is not enough."""
    try:
        if find_spec(name) is None:
            return False
        import_module(name)
    except (ImportError, ValueError):
        return False
    return True
