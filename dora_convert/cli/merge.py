"""dora-convert merge: the command, and its report for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click
from typing_extensions import Unpack

from ..options import MergeOptions
from ..settings import format_size
from . import takes
from .sink import Sink, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..reports.inspect import Landing
    from ..reports.merge import DryRunReport, MergeReport


@click.command("merge")
@click.argument("refs", nargs=-1, metavar="[BASE] ADAPTER... OUT", required=True)
@takes(MergeOptions)
def merge(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[MergeOptions]) -> None:
    """Fold LoRA and DoRA adapters into a base checkpoint.

    BASE and ADAPTER are folders or Hub repos (org/name[@revision]). Without BASE, the base that the adapter
    names is used. OUT is a new folder with the base's files, its weights merged, and a record of what was
    done in OUT/dora_convert.

    \b
    Examples:
      dora-convert merge ./base ./adapter ./merged
      dora-convert merge ./adapter ./merged --dry-run
      dora-convert merge --in-place ./model ./adapter
      dora-convert merge org/base ./style ./facts ./merged --weight 0.5 --weight 1
      dora-convert merge org/base me/adapter --push-to-hub me/merged --no-local
    """
    if len(refs) < (1 if keywords["no_local"] else 2):
        inputs_and_out = "an ADAPTER and OUT, and mostly a BASE before them"
        raise click.UsageError(f"merge needs {'a BASE and an ADAPTER' if keywords['in_place'] else inputs_and_out}.")
    from ..verbs.merge import merge as verb

    has_out = not (keywords["in_place"] or keywords["no_local"])
    inputs, out = (refs[:-1], refs[-1]) if has_out else (refs, None)
    base, adapters = (inputs[0], inputs[1:]) if len(inputs) > 1 else (None, inputs)
    report = verb(base, adapters, out, **keywords)
    sink.show(report, report.out, parts)


def parts(report: MergeReport | DryRunReport, *, every: bool) -> Iterator[Table | str]:
    """Yield the report for people: the ledger, and a summary."""
    yield ledger_table(report, every=every)
    yield from summary(report)


def ledger_table(report: MergeReport | DryRunReport | Landing, *, every: bool) -> Table:
    """Return the ledger by kind of weight, layers counted together; `every` lists each weight."""
    groups: dict[tuple[str, str], set[str]] = {}
    for entry in report.ledger:
        name = entry["into"][0].removesuffix(".weight") if entry["into"] else entry["tensor"]
        group = (name if every else fold_name(name), f"{entry['fate']}: {entry['why']}")
        groups.setdefault(group, set()).add(name)
    rows = [(kind, len(names), fate) for (kind, fate), names in groups.items()]
    return table(("module", ">n", "fate"), rows)


def fold_name(name: str) -> str:
    """Return a tensor's name without its layer numbers and PEFT's prefix."""
    return re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model."))


def summary(report: MergeReport | DryRunReport) -> Iterator[str]:
    """Yield the results of a merge, or of its plan, in a few lines."""
    counts, values = report.tensors, report.to_dict()
    added = f"{counts['added']} added, " if counts["added"] else ""
    tensors = (
        f"{counts['total']} tensors: {counts['merged']} merged, {counts['replaced']} replaced, {added}"
        f"{counts['copied']} copied"
    )
    fates = Counter(entry["fate"] for entry in report.ledger)
    yield f"{len(report.ledger)} adapter tensors: " + ", ".join(f"{n} {fate}" for fate, n in fates.items())
    if "plan" in values:
        yield f"{tensors}; nothing was written"
        yield _planned(values["plan"])
    else:
        yield f"{tensors}; {written(values)}"
        yield from _checks(values)
    yield f"out: {report.out}"


def written(values: Mapping[str, Any]) -> str:
    """Return the size, time and peak memory of a run."""
    peak = values["peak_memory_bytes"]
    memory = f"peak memory {format_size(peak)}" if peak else "peak memory unknown"
    return f"{format_size(values['bytes_written'])} in {values['seconds']:.1f} s, {memory}"


def _planned(plan: Mapping[str, int]) -> str:
    return (
        f"would write {format_size(plan['bytes_out'])} in {plan['shards']} files and an undo record of "
        f"at most {format_size(plan['undo_bytes'])}, holding {format_size(plan['memory'])} in memory"
    )


def _checks(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the results of the self-check, the upload, and the comparison of outputs."""
    if checked := values["verified"]:
        lost = "" if values["lost"] is None else f"; rounding took {values['lost']:.2%} of the change"
        yield (
            f"checked: {checked['wrong_elements']} of {checked['checked']:,} elements wrong, "
            f"at most {checked['max_ulp']} ulp from the exact result{lost}"
        )
    if pushed := values["pushed"]:
        yield f"pushed: {pushed['url']}, {format_size(pushed['bytes_uploaded'])}"
    if outputs := values["outputs"]:
        yield (
            f"outputs: {outputs['verdict']}, {outputs['max_abs_logit_error']:.2g} apart at most; "
            f"rounding alone leaves {outputs['rounding_floor']:.2g}"
        )
