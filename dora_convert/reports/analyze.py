"""Hold the report of analyze: a point for each module and step, correlations, and the collision of two adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import Report


@dataclass(frozen=True, kw_only=True)
class TunedStep:
    """One checkpoint or adapter that was compared with the base."""

    checkpoint: str
    """The address that points name."""
    title: str
    """A name without a path."""
    step: int
    """The number of a Trainer's folder checkpoint-N, else the position on the command line, from 1."""
    kind: str  # checkpoint, or the adapter's method
    modules: int
    """Matrices that were compared."""
    relative_change: float | None
    """‖ΔW‖/‖W‖ over all matrices together."""
    lost: float | None
    """The share of ΔW that rounding into the base's dtype loses, over all matrices together."""
    trainable_share: float | None
    """Trained parameters / (base's parameters + trained parameters); None for a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The movement of one module in one checkpoint: the mean over the rows of W, one row an output."""

    checkpoint: str
    step: int
    layer: int | None
    module: str
    kind: str
    """The shortest end of the module's name that tells the kinds apart, such as q_proj."""
    elements: int
    delta_magnitude: float
    """ΔM = mean |‖w'‖ − ‖w‖|."""
    delta_direction: float
    """ΔD = mean (1 − cos(w', w))."""
    relative_change: float | None
    """‖ΔW‖/‖W‖ (Frobenius); None if W is zero."""
    stable_rank: float | None
    """‖ΔW‖²/σ₁²; None if nothing changed. Of experts, the mean over those that changed."""
    effective_rank: float | None
    """exp of the entropy of σᵢ/Σσ (Roy and Vetterli, 2007); None if nothing changed, or for large matrices."""
    stable_rank_estimated: bool
    """True if σ₁ was estimated from a random sketch, because W is large."""
    lost: float | None
    """The share of ‖ΔW‖ that rounding W' into the base's dtype loses; None if nothing changed."""
    norm: float
    """mean ‖w‖."""
    norm_ratio: Mapping[str, float] | None
    """Quantiles of ‖w'‖/‖w‖: least, p5, median, p95 and most. For a DoRA, these are the quantiles of |m|/‖W‖."""
    column_magnitude: float | None = None
    """ΔM over the columns, for embeddings, whose rows are tokens: PEFT's DoRA has a magnitude for each column."""
    column_direction: float | None = None
    """ΔD over the columns, for embeddings."""


@dataclass(frozen=True, kw_only=True)
class KindCorrelation:
    """The correlation of ΔM and ΔD over the (layer, step) points of one kind of module."""

    r: float | None
    """Pearson's r; None for fewer than three points, or points that do not vary."""
    points: int
    low: float | None
    """The lower end of the 95 % confidence interval (Fisher's z); None for fewer than four points."""
    high: float | None
    slope: float | None
    """The slope of the line ΔM = intercept + slope·ΔD."""
    intercept: float | None
    note: str | None
    """A sentence if the points are too few to tell."""


@dataclass(frozen=True, kw_only=True)
class Collision:
    """The agreement of two adapters on one module."""

    module: str
    cosine: float | None
    """⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖·‖ΔW₂‖); None if one of the two is zero."""
    sign_conflicts: float | None
    """Of the elements that both change, the share with opposite signs; None without such elements."""
    elements: int


@dataclass(frozen=True, kw_only=True)
class MovedVector:
    """A bias or another vector that training changed; it has no direction to speak of."""

    checkpoint: str
    tensor: str
    relative_change: float | None


@dataclass(frozen=True, kw_only=True)
class AnalyzeReport(Report):
    """The report of analyze."""

    base: str
    tuned: tuple[TunedStep, ...]
    points: tuple[Point, ...]
    correlation: Mapping[str, KindCorrelation]
    trainable_share: Mapping[str, float]
    """The share by the address of each adapter, a number between 0 and 1."""
    collision: tuple[Collision, ...]
    """The modules that two adapters change both, if exactly two were given."""
    vectors: tuple[MovedVector, ...]
    notes: tuple[str, ...]
    """Sentences on the figures: training that hardly moved, exploded, or that rounding loses."""
    warnings: tuple[str, ...]
    device: str | None
    compute_dtype: str | None
    peak_memory_bytes: int | None
    top: int
    command: str = "analyze"
