"""What `verify` reports, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from . import __version__
from .report import SCHEMA


@dataclass(frozen=True, kw_only=True)
class CheckedModule:
    """One tensor that an adapter has a part in."""

    name: str
    elements: int
    wrong_elements: int
    """Elements that no honest rounding explains."""
    max_ulp: int
    """The largest distance from the rounded float64 result, in units in the last place of the merged dtype."""
    output_error: float | None
    """Relative error of W'x against the adapter's own forward, over the sample inputs."""
    output_floor: float | None
    """What that error would be if every element were rounded perfectly."""
    cause: str | None = None


@dataclass(frozen=True, kw_only=True)
class Untouched:
    """The tensors that no adapter has a part in."""

    tensors: int
    identical: int


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Whether a merged checkpoint does what base and adapters do."""

    base: str
    adapters: tuple[str, ...]
    merged: str
    verdict: str  # agree | differ
    modules: tuple[CheckedModule, ...]
    untouched: Untouched
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    """What differs and does not count."""
    warnings: tuple[str, ...]
    ledger: tuple[Mapping[str, Any], ...]
    seconds: float
    level: str = "weights"
    command: str = "verify"

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        return {"schema": SCHEMA, "version": __version__, **asdict(self)}
