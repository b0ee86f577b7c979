"""Hold the report of inspect on an adapter, and put it into words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..settings import format_size
from . import Report, Table, cut, table
from .advice import LoaderAdvice, commands_of, loaders_table
from .merge import ledger_table


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
    maker: str | None
    """The program that wrote the files, if they tell more than the format's name."""
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
    loaders: tuple[LoaderAdvice, ...] = ()
    """The programs that load adapters, each with its verdict."""
    unusual: tuple[str, ...] = ()
    """Sentences on everything odd."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Over all modules: ranks, scalings, targets, kinds, and the axes of magnitudes."""

    def parts(self, *, every: bool) -> Iterator[Table | str]:
        """Yield tables first, then a few lines; `every` lists each weight."""
        yield modules_table(self.modules, every=every) if self.modules else weights_table(self.weights)
        if self.landing and self.landing.ledger:
            yield ledger_table(self.landing.ledger, every=every)
        if self.loaders:
            yield loaders_table(self.loaders)
        yield from about_adapter(self, every=every)
        yield from commands_of(self.loaders)


def modules_table(modules: Iterable[Module], *, every: bool) -> Table:
    """Return an adapter's changes by kind of weight, layers counted together; `every` lists each weight."""
    groups: dict[tuple[str, ...], list[Module]] = {}
    for module in modules:
        scaling = "" if module.scaling is None else f"{module.scaling:g}"
        name = (module.target if every else module.kind).removesuffix(".weight")
        groups.setdefault((name, _method(module), scaling, module.rule or ""), []).append(module)
    rows = [
        (name, len(group), method, _numbers(group), scaling, rule)
        for (name, method, scaling, rule), group in groups.items()
    ]
    return table(("module", ">n", "method", ">rank", ">scaling", "rule"), rows)


def _method(module: Module) -> str:
    if module.rows is not None:
        return f"{module.rows} trained rows"
    if module.method == "whole":
        return f"saved whole, {_shape(module.shape or ())}"
    return f"{module.method}, {module.experts} experts" if module.experts else module.method


def _numbers(modules: Sequence[Module]) -> str:
    return ", ".join(map(str, sorted({module.rank for module in modules if module.rank is not None})))


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def weights_table(weights: Iterable[Mapping[str, Any]]) -> Table:
    """Return tensors by kind, layers counted together."""
    rows = [(kind["kind"], kind["tensors"], kind["dtype"], _shape(kind["shape"])) for kind in weights]
    return table(("tensor", ">n", "dtype", "shape"), rows)


def about_adapter(report: AdapterReport, *, every: bool) -> Iterator[str]:
    """Yield the facts of an adapter, in a few lines."""
    maker = f", by {report.maker}" if report.maker else ""
    yield f"adapter: {report.title}, {report.method} in the {report.format} format{maker}"
    base = f"{report.base}{f' at {report.revision}' if report.revision else ''}" if report.base else "not said"
    yield f"trained on: {base}{f', as {report.task}' if report.task else ''}"
    if report.layers:
        yield f"layers of the base, in this order: {', '.join(map(str, report.layers))}"
    yield totals(report)
    reasons: dict[str, list[str]] = {}
    for name, why in report.ignored.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        yield f"ignored: {len(names)} tensors, {why}{': ' + ', '.join(names) if every else ''}"
    if report.refused:
        yield f"would not be merged: {report.refused['message']}"
        yield from _listed(report.refused["faults"], every=every)
    if report.faults:
        yield f"would not be merged: {len(report.faults)} faults"
        yield from _listed(report.faults, every=every)
    if axes := report.facts.get("axes"):
        yield f"magnitudes: one for each of W's {' or '.join(axes)}"
    yield from (f"unusual: {text}" for text in report.unusual)
    yield from (f"note: {note}" for note in report.notes)
    if report.landing:
        yield from about_landing(report.landing, every=every)


def about_landing(landing: Landing, *, every: bool) -> Iterator[str]:
    """Yield the match of an adapter with a base, or the faults."""
    yield from (f"warning: {warning}" for warning in landing.warnings)
    if landing.fits:
        counts = ", ".join(f"{landing.tensors[fate]} {fate}" for fate in ("merged", "replaced", "added", "copied"))
        yield f"fits {landing.base}: {landing.tensors['total']} tensors, {counts}"
        return
    yield f"does not fit {landing.base}: {landing.message}"
    yield from _listed(landing.faults, every=every)
    if landing.hint:
        yield f"hint: {landing.hint}"


def _listed(faults: Sequence[Mapping[str, str]], *, every: bool) -> Iterator[str]:
    """Yield faults, one a line."""
    shown = cut(faults, every=every)
    yield from (f"  {fault['what']}  {fault['why']}" for fault in shown)
    if len(faults) > len(shown):
        yield f"  … and {len(faults) - len(shown)} more"


def totals(report: Inspection) -> str:
    """Return the numbers of tensors and parameters, and the size, in a line."""
    dtypes = ", ".join(f"{total['tensors']} {name}" for name, total in report.dtypes.items())
    return f"{report.tensors} tensors ({dtypes}), {report.parameters:,} parameters, {format_size(report.bytes)}"
