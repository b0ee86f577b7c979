"""What `verify` reports, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__
from .merge import SCHEMA


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


@dataclass(frozen=True, kw_only=True)
class OutputsReport:
    """Whether a merged checkpoint says what base and adapters say, on sample prompts."""

    base: str
    adapters: tuple[str, ...]
    merged: str
    verdict: str  # agree | differ
    architecture: str
    prompts: int
    positions: int
    """Outputs compared: tokens of generating models, each with its logits; one of a classifier for each prompt."""
    max_abs_logit_error: float
    mean_abs_logit_error: float
    rounding_floor: float
    """The largest difference that half a unit in the last place of the merged weights' dtype leaves, or arithmetic."""
    mean_rounding_floor: float
    mean_margin: float
    """How many times its floor the mean difference may be."""
    max_margin: float
    """The same for the largest."""
    mean_kl: float
    """KL(reference ‖ merged) in nats, averaged over positions."""
    top1_agreement: float
    """Share of positions where both have the same largest output."""
    greedy_agreement: float | None
    """Share of prompts that both continue with the same tokens; None for models that do not generate."""
    device: str
    offloaded: bool
    """Whether weights were read from their files block by block."""
    memory_bytes: int
    """What it was estimated to take, beyond Python and its libraries."""
    peak_memory_bytes: int | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float
    level: str = "outputs"
    command: str = "verify"

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        return {"schema": SCHEMA, "version": __version__, **asdict(self)}
