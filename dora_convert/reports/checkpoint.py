"""Hold the report of inspect on a checkpoint, and put it into words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..settings import format_size
from . import Table, joined
from .advice import LoaderAdvice, loaders_table
from .inspect import Inspection, totals, weights_table


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
    dense_parameters: int = 0
    """Number of weights when quantised ones are decoded; tensors under two names count once."""
    coded: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Kinds of quantised tensors that are decoded, with their numbers."""
    loaders: tuple[LoaderAdvice, ...] = ()
    """The programs that load checkpoints, each with its verdict."""

    def parts(self, *, every: bool) -> Iterator[Table | str]:
        """Yield the tensors, then a few lines; `every` lists each shard and file."""
        yield weights_table(self.weights)
        if self.loaders:
            yield loaders_table(self.loaders)
        yield from about_checkpoint(self, every=every)


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
    yield totals(report)
    if report.tied:
        stored = "stored under both names" if report.tied["head_stored"] else "stored once"
        yield f"tied: {report.tied['head']} is {report.tied['embedding']}, {stored}"
    if report.quantised:
        bits = f", {report.quantised['bits']} bits" if report.quantised["bits"] else ""
        yield f"quantised: {report.quantised['method']}{bits}"
    for title, count in report.coded.items():
        yield f"decoded: {count['tensors']} weights, {title}"
    if report.dense_parameters != report.parameters:
        yield f"when decoded: {report.dense_parameters:,} weights"
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
