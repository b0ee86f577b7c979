"""Hold the report of analyze, and put it into words: points, correlations, the collision of two adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from . import Report, Table, cut, rest, table


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

    @property
    def short(self) -> str:
        """The answer in a line: the relative change of the last step, or shares without one."""
        if not self.tuned:
            return "\n".join(f"{share:.4%}" for share in self.trainable_share.values())
        return _number(self.tuned[-1].relative_change)

    def parts(self, *, every: bool) -> Iterator[Table | str]:
        """Yield the modules that moved most, correlations, two adapters, and a few lines."""
        last = self.tuned[-1].checkpoint if self.tuned else ""
        points = sorted((point for point in self.points if point.checkpoint == last), key=_moved, reverse=True)
        shown = points if every else points[: self.top]
        if shown:
            yield points_table(shown)
        if len(points) > len(shown):
            yield f"… and {len(points) - len(shown)} modules more (--top, --verbose)"
        if self.correlation:
            yield correlations_table(self)
            yield from (f"{kind}: {each.note}" for kind, each in self.correlation.items() if each.note)
        if self.collision:
            worst = sorted(self.collision, key=_against)
            yield collisions_table(worst if every else worst[: self.top])
        yield from (about_step(step) for step in self.tuned)
        yield from _vectors(self, every=every)
        if not self.tuned:
            yield from (
                f"{name}: {share:.4%} of the parameters trained" for name, share in self.trainable_share.items()
            )
        yield from (f"note: {note}" for note in self.notes)


def _moved(point: Point) -> float:
    return point.relative_change or 0.0


def _against(collision: Collision) -> float:
    return 2.0 if collision.cosine is None else collision.cosine


def points_table(points: Sequence[Point]) -> Table:
    """Return the movement of some modules."""
    rows = [
        (
            point.module,
            f"{point.delta_magnitude:.3g}",
            f"{point.delta_direction:.3g}",
            _number(point.relative_change),
            _rank(point.stable_rank, estimated=point.stable_rank_estimated),
            _rank(point.effective_rank),
            _ratio(point),
            _percent(point.lost),
        )
        for point in points
    ]
    heads = (">ΔM", ">ΔD", ">‖ΔW‖/‖W‖", ">stable rank", ">effective rank", ">‖w'‖/‖w‖, 5–95 %", ">lost")
    return table(("module", *heads), rows)


def correlations_table(report: AnalyzeReport) -> Table:
    """Return the correlation of ΔM and ΔD by kind of module."""
    rows = [(kind, each.points, _signed(each.r), _interval(each)) for kind, each in report.correlation.items()]
    return table(("correlation of ΔD and ΔM", ">points", ">r", ">95 %"), rows)


def collisions_table(collisions: Sequence[Collision]) -> Table:
    """Return the agreement of two adapters, the worst first."""
    rows = [(each.module, _signed(each.cosine), _percent(each.sign_conflicts)) for each in collisions]
    return table(("both adapters change", ">cosine", ">opposite signs"), rows)


def about_step(step: TunedStep) -> str:
    """Return the figures of one step over all matrices, in a line."""
    share = "" if step.trainable_share is None else f", {step.trainable_share:.3%} of the parameters trained"
    return (
        f"{step.title} ({step.kind}, step {step.step}): {step.modules} matrices, "
        f"‖ΔW‖/‖W‖ {_number(step.relative_change)}, rounding loses {_percent(step.lost)}{share}"
    )


def _vectors(report: AnalyzeReport, *, every: bool) -> Iterator[str]:
    """Yield the vectors that moved."""
    last = report.tuned[-1].checkpoint if report.tuned else ""
    moved = [each for each in report.vectors if each.checkpoint == last]
    moved.sort(key=lambda each: -(each.relative_change or 0.0))
    yield from (f"vector {each.tensor}: ‖Δw‖/‖w‖ {_number(each.relative_change)}" for each in cut(moved, every=every))
    yield from rest(moved, "vectors", every=every)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _rank(value: float | None, *, estimated: bool = False) -> str:
    return "–" if value is None else f"{'≈' * estimated}{value:.1f}"


def _ratio(point: Point) -> str:
    ratio = point.norm_ratio
    return "–" if ratio is None else f"{ratio['p5']:.3f}–{ratio['p95']:.3f}"


def _interval(each: KindCorrelation) -> str:
    return "–" if each.low is None or each.high is None else f"{each.low:+.2f} to {each.high:+.2f}"
