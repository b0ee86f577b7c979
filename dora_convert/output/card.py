"""Render model cards: the inputs of a checkpoint or an adapter, and the command that repeats it.

huggingface_hub writes the front matter. A card is a function of the inputs: no dates, no name of the output,
never a local path. The last line holds a hash of the other lines, which identifies a card that nobody has
edited.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from .. import __version__
from ..naming.families import PIPELINES
from ..plan.plan import Plan
from ..storage.refs import Source
from ..storage.safetensors import CONFIG_DTYPES

NAME = "README.md"
INHERITED = ("license", "license_name", "license_link", "language")
"""Fields that a card takes from the base's card."""

_MARK = re.compile(rb"<!-- dora-convert card ([0-9a-f]{32}) -->\n?\Z")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The contents of a card."""

    title: str
    about: str
    kinds: tuple[str, ...]
    relation: str  # finetune | adapter
    base_model: str | None
    """The base's repo id; None if only a path is known."""
    library: str | None = None
    pipeline: str | None = None
    inherited: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the base's card."""
    sources: tuple[tuple[str, str, str], ...] = ()
    """Role, name and commit."""
    made_by: str = ""
    command: tuple[str, ...] = ()
    checks: tuple[tuple[str, str], ...] = ()
    unmerge: tuple[str, ...] = ()
    record: bool = False
    """True if a receipt lies beside the card."""


def render(facts: Facts) -> bytes:
    """Render a card as README.md holds it."""
    from huggingface_hub import ModelCardData

    tags = [kind.lower() for kind in facts.kinds] + (["merged"] if facts.relation == "finetune" else [])
    fields: dict[str, Any] = {
        **facts.inherited,
        "library_name": facts.library,
        "pipeline_tag": facts.pipeline,
        "base_model": facts.base_model,
        "base_model_relation": facts.relation if facts.base_model else None,
        "tags": [*tags, "dora-convert"],
    }
    data = ModelCardData(**fields)
    text = f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n" + "\n".join(_body(facts)) + "\n"
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    return f"{text}<!-- dora-convert card {digest} -->\n".encode()


def _body(facts: Facts) -> Iterator[str]:
    yield from (f"# {facts.title}", "", facts.about, "")
    if facts.sources:
        yield from ("| | name | commit |", "|---|---|---|")
        yield from (f"| {role} | {name} | {commit} |" for role, name, commit in facts.sources)
        yield ""
    if facts.command:
        yield from (f"Made by {facts.made_by}:", "", *_shell(facts.command))
    if facts.checks:
        yield from ("Checked against a float64 recomputation before it was published:", "", "| | |", "|---|---|")
        yield from (f"| {name} | {value} |" for name, value in facts.checks)
        yield ""
    if facts.unmerge:
        yield from ("To take it out again:", "", *_shell(facts.unmerge))
    if facts.record:
        yield from ("`dora_convert/receipt.json` lists every tensor that changed with its hashes.", "")


def _shell(command: Sequence[str]) -> list[str]:
    return ["```bash", shlex.join(command), "```", ""]


def is_unedited(card: bytes) -> bool:
    """Return True if a README is a card as `render` wrote it, which a new card may replace."""
    match = _MARK.search(card)
    return match is not None and xxhash.xxh3_128_hexdigest(card[: match.start()]).encode() == match[1]


FRONT_MATTER = 1 << 20
"""Characters of a README that are read for its front matter."""


def metadata_of(readme: Path) -> dict[str, Any]:
    """Return the front matter of a README; empty if there is none, or none that can be read."""
    from huggingface_hub import ModelCard

    try:
        with readme.open(encoding="utf-8") as file:
            text = file.read(FRONT_MATTER)
        if not text.startswith("---"):
            return {}
        data = ModelCard(text, ignore_metadata_errors=True).data
        metadata: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - YAML of any content: the new card does without
        return {}
    return metadata


def inherited(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that models derived from a model keep."""
    return {name: metadata[name] for name in INHERITED if metadata.get(name)}


def pipeline_of(config: Mapping[str, Any] | None, metadata: Mapping[str, Any]) -> str | None:
    """Return the task of a model, from its architecture or else from the base's card."""
    for name in (config or {}).get("architectures") or ():
        for end, pipeline in PIPELINES.items():
            if str(name).endswith(end):
                return pipeline
    tag = metadata.get("pipeline_tag")
    return tag if isinstance(tag, str) else None


def card_bytes(plan: Plan, base_model: str | None, checks: Sequence[tuple[str, str]] = ()) -> bytes:
    """Render README.md for a merge's OUT; `checks` are the rows of the self-check's table."""
    base, counts, names = plan.base, plan.counts(), [adapter.source for adapter in plan.adapters]
    metadata = {} if base.is_file else metadata_of(base.root / NAME)
    kinds = tuple(sorted({adapter.kind for adapter in plan.adapters}))
    undo = () if plan.options.undo == "none" else ("unmerge", "MERGED", *(each.title for each in names), "OUT")
    facts = Facts(
        title=f"{base.source.name} with {', '.join(source.name for source in names)}",
        about=f"{' and '.join(kinds)} folded into the weights of {base.source.name}. "
        f"{counts['merged']} tensors merged, {counts['replaced']} replaced, {counts['copied']} copied as they were.",
        kinds=kinds,
        relation="finetune",
        base_model=base_model or base.source.repo,
        library="transformers" if base.model_types else None,
        pipeline=pipeline_of(plan.output_config, metadata),
        inherited=inherited(metadata),
        sources=(source_row("base", base.source), *(source_row("adapter", source) for source in names)),
        made_by=f"dora-convert {__version__}",
        command=tuple(command(plan)),
        checks=tuple(checks),
        unmerge=undo and ("dora-convert", *undo),
        record=True,
    )
    return render(facts)


def command(plan: Plan) -> list[str]:
    """Return the command line that repeats a merge, with the inputs by title and the output as OUT."""
    options, sources = plan.options, [plan.base.source, *(adapter.source for adapter in plan.adapters)]
    words = ["dora-convert", "merge", *(source.title for source in sources), "OUT"]
    if any(weight != 1 for weight in plan.weights):
        words += [word for weight in plan.weights for word in ("--weight", _number(weight))]
    for flag, value in (
        ("--dtype", CONFIG_DTYPES.get(options.dtype or "")),
        ("--compute-dtype", "float32" if options.compute_dtype == "F32" else None),
        ("--max-shard-size", options.max_shard_size),
        ("--undo", options.undo if options.undo != "norms" else None),
        *(("--include", glob) for glob in options.include),
        *(("--exclude", glob) for glob in options.exclude),
        *(("--ignore-field", name) for name in options.ignore_field),
    ):
        words += [flag, str(value)] if value else []
    return [*words, "--allow-unmatched"] if options.allow_unmatched else words


def _number(value: float) -> str:
    """Write a number as people do, without loss of a digit."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def source_row(role: str, source: Source) -> tuple[str, str, str]:
    """Return one row of a card's table of inputs."""
    return role, source.repo or source.name, source.commit or ""
