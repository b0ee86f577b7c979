"""dora-convert inspect: the command, and its report for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from typing_extensions import Unpack

from ..options import InspectOptions
from ..reports.inspect import AdapterReport, CheckpointReport, Landing, Module
from ..settings import format_size
from . import takes
from .merge import ledger_table
from .sink import Sink, cut, joined, table

if TYPE_CHECKING:
    from rich.table import Table


@click.command("inspect")
@click.argument("ref")
@click.option("--base", metavar="REF", help="Show the place of each adapter tensor in this base.")
@takes(InspectOptions)
def inspect(ref: str, *, sink: Sink, base: str | None, **keywords: Unpack[InspectOptions]) -> None:
    """Describe an adapter or a checkpoint from its headers, never from its weights.

    REF is a folder, a single weight file or a Hub repo (org/name[@revision]). Of a model on the Hub, only the
    headers of its weight files are downloaded.

    \b
    Examples:
      dora-convert inspect ./adapter
      dora-convert inspect ./adapter --base org/base
      dora-convert inspect org/base --json
    """
    from ..verbs.inspect import inspect as verb

    report = verb(ref, base, **keywords)
    sink.show(report, f"{report.kind} {report.title}", parts)


def parts(report: AdapterReport | CheckpointReport, *, every: bool) -> Iterator[Table | str]:
    """Yield the report for people: tables first, then a few lines."""
    if isinstance(report, AdapterReport):
        if report.modules:
            yield modules_table(report.modules, every=every)
        else:
            yield weights_table(report.weights)
        if report.landing and report.landing.ledger:
            yield ledger_table(report.landing, every=every)
        lines = about_adapter(report, every=every)
    else:
        yield weights_table(report.weights)
        lines = about_checkpoint(report, every=every)
    yield from lines


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
    yield f"adapter: {report.title}, {report.method} in the {report.format} format"
    base = f"{report.base}{f' at {report.revision}' if report.revision else ''}" if report.base else "not said"
    yield f"trained on: {base}{f', as {report.task}' if report.task else ''}"
    if report.layers:
        yield f"layers of the base, in this order: {', '.join(map(str, report.layers))}"
    yield _totals(report)
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


def about_checkpoint(report: CheckpointReport, *, every: bool) -> Iterator[str]:
    """Yield the facts of a checkpoint, in a few lines."""
    model = ", ".join(report.architectures) or "model"
    yield f"checkpoint: {report.title}, {model}{f' ({report.model_type})' if report.model_type else ''}"
    files = report.index or report.shards[0]["file"]
    yield f"stored as {report.format}: {files}{f', {len(report.shards)} shards' if report.index else ''}"
    if every:
        yield from (
            f"  {shard['file']}  {shard['tensors']} tensors, {format_size(shard['bytes'])}" for shard in report.shards
        )
    yield _totals(report)
    if report.tied:
        stored = "stored under both names" if report.tied["head_stored"] else "stored once"
        yield f"tied: {report.tied['head']} is {report.tied['embedding']}, {stored}"
    if report.quantised:
        bits = f", {report.quantised['bits']} bits" if report.quantised["bits"] else ""
        yield f"quantised: {report.quantised['method']}{bits}"
    yield from map(about_merge, report.merges)
    for label, names in (("beside the weights", report.side_files), ("not part of the model", report.left_behind)):
        if names:
            yield f"{label}: {joined(names, every=every)}"
    yield from (f"note: {note}" for note in report.notes)


def about_merge(merge: Mapping[str, Any]) -> str:
    """Return the facts of an earlier merge, from its receipt, in a line."""
    if "error" in merge:
        return f"note: {merge['error']}"
    adapters = ", ".join(map(_merged, merge["adapters"]))
    version = merge["versions"].get("dora_convert", "of an unknown version")
    return (
        f"made by {merge['verb']} with dora-convert {version}: {adapters} into "
        f"{merge['base'].get('name')}; undo {merge['undo']}"
    )


def _merged(adapter: Mapping[str, Any]) -> str:
    weight = "" if adapter["weight"] in (None, 1) else f", weight {adapter['weight']}"
    return f"{adapter['name']} ({adapter['kind']}{weight})"


def _totals(report: AdapterReport | CheckpointReport) -> str:
    dtypes = ", ".join(f"{total['tensors']} {name}" for name, total in report.dtypes.items())
    return f"{report.tensors} tensors ({dtypes}), {report.parameters:,} parameters, {format_size(report.bytes)}"
