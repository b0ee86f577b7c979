"""dora-convert from-lora, to-lora and extract: the commands, and their report for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from typing_extensions import Unpack

from ..options import ExtractOptions, FromLoraOptions, ToLoraOptions
from ..settings import format_size
from . import takes
from .merge import fold_name, written
from .sink import Sink, joined, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..reports.fitting import MadeDryRun, MadeReport

COLUMNS = {"output_error": "output error", "lora_error": "LoRA's error"}
"""Further numbers of a module, for the verbs that report them."""


@click.command("from-lora")
@click.argument("refs", nargs=-1, metavar="[BASE] LORA OUT", required=True)
@takes(FromLoraOptions)
def from_lora(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[FromLoraOptions]) -> None:
    """Make a DoRA of a LoRA, with the same outputs.

    BASE and LORA are folders or Hub repos (org/name[@revision]). Without BASE, the base that the adapter
    names is used. OUT is a PEFT adapter: the same factors, and for each module the magnitude m = ‖W + sBA‖.

    \b
    Examples:
      dora-convert from-lora ./base ./lora ./dora
      dora-convert from-lora ./lora ./dora --init pretrained
    """
    if not 2 <= len(refs) <= 3:
        raise click.UsageError("from-lora needs a LORA and OUT, and mostly a BASE before them.")
    from ..verbs.from_lora import from_lora as verb

    *base, adapter, out = refs
    show(sink, verb(base[0] if base else None, adapter, out, **keywords))


@click.command("to-lora")
@click.argument("refs", nargs=-1, metavar="[BASE] ADAPTER OUT", required=True)
@takes(ToLoraOptions)
def to_lora(refs: tuple[str, ...], *, sink: Sink, **keywords: Unpack[ToLoraOptions]) -> None:
    """Make a plain LoRA of a DoRA or any other adapter, or a LoRA of another rank.

    BASE and ADAPTER are folders or Hub repos (org/name[@revision]). Without BASE, the base that the adapter
    names is used. OUT is a PEFT adapter with, for each module, the best factors of ADAPTER's change. Exactly
    one of --rank, --energy and --max-error sets the quality of the factors, which is measured.

    \b
    Examples:
      dora-convert to-lora ./base ./dora ./lora --rank 32
      dora-convert to-lora ./base ./lora ./smaller --max-error 0.01
    """
    if not 2 <= len(refs) <= 3:
        raise click.UsageError("to-lora needs an ADAPTER and OUT, and mostly a BASE before them.")
    from ..verbs.to_lora import to_lora as verb

    *base, adapter, out = refs
    show(sink, verb(base[0] if base else None, adapter, out, **keywords))


@click.command("extract")
@click.argument("base")
@click.argument("tuned")
@click.argument("out")
@takes(ExtractOptions)
def extract(base: str, tuned: str, out: str, *, sink: Sink, **keywords: Unpack[ExtractOptions]) -> None:
    """Make an adapter of a fine-tuned checkpoint.

    BASE and TUNED are folders or Hub repos (org/name[@revision]) with tensors of the same names. OUT is a
    PEFT adapter: factors for the linear weights that differ, and everything else that differs whole. Exactly
    one of --rank, --energy and --max-error sets the quality of the factors, which is measured.

    \b
    Examples:
      dora-convert extract ./base ./tuned ./dora --rank 16
      dora-convert extract ./base ./tuned ./lora --kind lora --max-error 0.1
    """
    from ..verbs.extract import extract as verb

    show(sink, verb(base, tuned, out, **keywords))


def show(sink: Sink, report: MadeReport | MadeDryRun) -> None:
    """Print a report."""
    sink.show(report, report.out, parts)


def parts(report: MadeReport | MadeDryRun, *, every: bool) -> Iterator[Table | str]:
    """Yield the report for people: the modules, and a summary."""
    values = report.to_dict()
    if "plan" in values:
        yield from _planned(values["plan"])
    else:
        yield _modules_table(values["modules"], every=every)
        yield from _summary(values, every=every)
    yield f"out: {report.out}"


def _planned(plan: dict[str, Any]) -> Iterator[str]:
    yield f"{len(plan['modules'])} modules; nothing was written"
    yield (
        f"would write at most {format_size(plan['bytes_out'])}, holding {format_size(plan['memory'])} "
        f"in memory (at least {format_size(plan['least_memory'])})"
    )


def _modules_table(modules: list[dict[str, Any]], *, every: bool) -> Table:
    """Return the ranks and the largest errors by kind of module; `every` lists each module."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for module in modules:
        name = module["name"].removesuffix(".weight")
        groups.setdefault(name if every else fold_name(name), []).append(module)
    more = [key for key in COLUMNS if any(key in module for module in modules)]
    rows = [
        (name, len(group), _ranks(group), *(_largest(group, key) for key in ("relative_error", *more)))
        for name, group in groups.items()
    ]
    columns = ("module", ">n", ">rank", ">largest error", *(f">{COLUMNS[key]}" for key in more))
    return table(columns, rows)


def _ranks(modules: list[dict[str, Any]]) -> str:
    ranks = sorted({module["rank"] for module in modules})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} – {ranks[-1]}"


def _largest(modules: list[dict[str, Any]], key: str) -> str:
    values = [module[key] for module in modules if module.get(key) is not None]
    return f"{max(values):.2g}" if values else ""


def _summary(report: dict[str, Any], *, every: bool) -> Iterator[str]:
    """Yield the error over all modules, sizes, and the upload."""
    yield f"relative error over all modules: {report['relative_error']:.2g}"
    if names := report.get("left_as_lora"):
        yield f"left as LoRA in OUT/lora: {joined(names, every=every)}"
    yield written(report)
    if pushed := report.get("pushed"):
        yield f"pushed: {pushed['url']}"
