"""Hold the reports of inspect: of an adapter, and of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import Report


@dataclass(frozen=True, kw_only=True)
class Inspection(Report):
    """The fields of every REF: its address, kind, format and tensors."""

    kind: str  # adapter | checkpoint
    format: str
    title: str
    """A name without a path."""
    ref: str
    repo: str | None
    commit: str | None
    tensors: int
    parameters: int
    """Number of elements; elements that tensors share count once."""
    bytes: int
    dtypes: Mapping[str, Mapping[str, int]]
    """Number of tensors, parameters and bytes of each dtype."""
    weights: tuple[Mapping[str, Any], ...]
    """Tensors grouped by name (layer numbers as `*`), dtype and shape, with the number in each group."""
    notes: tuple[str, ...]
    command: str = "inspect"


@dataclass(frozen=True, kw_only=True)
class Module:
    """An adapter's tensors for one weight."""

    target: str
    kind: str
    """The target with its layer numbers as `*`."""
    method: str  # LoRA, DoRA, AdaLoRA, PiSSA, …; bias, whole, rows
    what: str
    rank: int | None = None
    scaling: float | None = None
    rule: str | None = None
    """The rule that gives the scaling."""
    experts: int | None = None
    rows: int | None = None
    shape: tuple[int, ...] | None = None
    """Shape of a weight saved whole, of trained rows, or of a bias."""
    among: tuple[str, ...] = ()
    """The weights that `target` may mean, if only a base can tell."""
    bytes: int
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Landing:
    """The fate of an adapter's tensors in a base, or the reason why they do not match."""

    base: str
    fits: bool
    message: str | None
    hint: str | None
    faults: tuple[Mapping[str, str], ...]
    ledger: tuple[Mapping[str, Any], ...]
    """The fate of every adapter tensor; empty or with unmatched tensors if `fits` is False."""
    tensors: Mapping[str, int]
    """Output tensors by fate."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AdapterReport(Inspection):
    """The report on an adapter."""

    method: str
    base: str | None
    """The base's name in the adapter's config."""
    revision: str | None
    task: str | None
    layers: tuple[int, ...]
    """The base's layers in the order of the trained model, if layers were repeated or left out."""
    modules: tuple[Module, ...]
    ignored: Mapping[str, str]
    faults: tuple[Mapping[str, str], ...]
    refused: Mapping[str, Any] | None
    """The error of a merge, if the adapter is of a kind that is not merged."""
    landing: Landing | None


@dataclass(frozen=True, kw_only=True)
class CheckpointReport(Inspection):
    """The report on a checkpoint."""

    architectures: tuple[str, ...]
    model_type: str | None
    shards: tuple[Mapping[str, Any], ...]
    index: str | None
    tied: Mapping[str, Any] | None
    quantised: Mapping[str, Any] | None
    side_files: tuple[str, ...]
    left_behind: tuple[str, ...]
    """Files, such as stale weights, that a loader does not use."""
    merges: tuple[Mapping[str, Any], ...]
    """The receipts of earlier merges, the latest first."""
