"""What `inspect` reports, as data: an adapter's anatomy, or a checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__
from .merge import SCHEMA


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What every REF has: where it is, its kind and format, and its tensors."""

    kind: str  # adapter | checkpoint
    format: str
    title: str
    """What it is called: never a path."""
    ref: str
    repo: str | None
    commit: str | None
    tensors: int
    parameters: int
    """Elements; those that several tensors share count once, as their bytes do."""
    bytes: int
    dtypes: Mapping[str, Mapping[str, int]]
    """Each dtype's number of tensors, parameters and bytes."""
    weights: tuple[Mapping[str, Any], ...]
    """Tensors by name with layer numbers as `*`, dtype and shape, and how many there are of each."""
    notes: tuple[str, ...]
    seconds: float
    command: str = "inspect"

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        return {"schema": SCHEMA, "version": __version__, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Module:
    """What an adapter has for one weight."""

    target: str
    kind: str
    """The target with its layer numbers as `*`."""
    method: str  # LoRA, DoRA, AdaLoRA, PiSSA, …; bias, whole, rows
    what: str
    rank: int | None = None
    scaling: float | None = None
    rule: str | None = None
    """How the scaling came about."""
    experts: int | None = None
    rows: int | None = None
    shape: tuple[int, ...] | None = None
    """Of what is saved whole, of trained rows, or of a bias."""
    among: tuple[str, ...] = ()
    """The weights that it may be for, where only a base can tell."""
    bytes: int
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Landing:
    """Where an adapter's tensors would go in a base, or why they would not."""

    base: str
    fits: bool
    message: str | None
    hint: str | None
    faults: tuple[Mapping[str, str], ...]
    ledger: tuple[Mapping[str, Any], ...]
    """Every adapter tensor's fate; where something does not fit, empty or with unmatched ones."""
    tensors: Mapping[str, int]
    """Output tensors by fate."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AdapterReport(Inspection):
    """What an adapter is."""

    method: str
    base: str | None
    """The base it was trained on, as its author named it."""
    revision: str | None
    task: str | None
    layers: tuple[int, ...]
    """The base's layers in the order of the trained model, where some were repeated or left out."""
    modules: tuple[Module, ...]
    ignored: Mapping[str, str]
    faults: tuple[Mapping[str, str], ...]
    refused: Mapping[str, Any] | None
    """The error that a merge would stop with, where it is of a kind that is not merged."""
    landing: Landing | None


@dataclass(frozen=True, kw_only=True)
class CheckpointReport(Inspection):
    """What a checkpoint is."""

    architectures: tuple[str, ...]
    model_type: str | None
    shards: tuple[Mapping[str, Any], ...]
    index: str | None
    tied: Mapping[str, Any] | None
    quantised: Mapping[str, Any] | None
    side_files: tuple[str, ...]
    left_behind: tuple[str, ...]
    """Weights and the like that a loader does not use."""
    merges: tuple[Mapping[str, Any], ...]
    """What the receipts of earlier merges say, the latest first."""
