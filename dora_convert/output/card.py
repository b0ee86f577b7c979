"""Render model cards: the inputs of a checkpoint or an adapter, and the command that repeats it.

A card is a function of the inputs: no dates, no name of the output, never a
local path. The last line holds a hash of the other lines, which identifies a card that nobody has edited.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ..adapters import Adapter
from ..errors import printable
from ..naming.families import PIPELINES
from ..option_table import QUANTISED, REPEATED
from ..options import flag
from ..plan.plan import Plan
from ..settings import __version__
from ..storage.checkpoint import Checkpoint
from ..storage.refs import Source
from ..storage.safetensors import CONFIG_DTYPES
from .usage import PIPELINE, architectures, library_of, loading_code

NAME = "README.md"
LISTS = ("language", "datasets")
"""Fields that a card takes from the cards of all works, as lists."""
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

FIELDS = (
    "base_model", "datasets", "language", "library_name", "license", "license_name", "license_link", "pipeline_tag",
    "tags", "base_model_relation",
)  # fmt: skip
"""The fields of a card in the order in which huggingface_hub writes them."""

_FRONT = re.compile(rb"---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")
MARK = re.compile(rb"<!-- dora-convert card ([0-9a-f]{32}) -->\n?\Z")


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
    inherited: Inherited = field(default_factory=lambda: Inherited({}))
    config: Mapping[str, Any] | None = None
    """The config of the model that is loaded."""
    task: str | None = None
    """The class of an adapter's model, or the end of its name."""
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
    import yaml  # type: ignore[import-untyped] # its stubs are a package of their own

    tags = [kind.lower() for kind in facts.kinds] + (["merged"] if facts.relation == "finetune" else [])
    fields: dict[str, Any] = {
        **facts.inherited.fields,
        "library_name": facts.library,
        "pipeline_tag": facts.pipeline,
        "base_model": facts.base_model,
        "base_model_relation": facts.relation if facts.base_model else None,
        "tags": [*tags, "dora-convert"],
    }
    given = {name: fields[name] for name in FIELDS if fields.get(name) is not None}
    given["tags"] = list(dict.fromkeys(given["tags"]))
    front = yaml.dump(given, stream=None, allow_unicode=True, sort_keys=False, line_break="\n").strip()
    lines = ["---", *front.split("\n"), "---", "", *_body(facts), ""]
    return marked("\n".join(map(printable, lines)))


def marked(text: str) -> bytes:
    """Return a card with the hash of its text."""
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    return f"{text}<!-- dora-convert card {digest} -->\n".encode()


def _body(facts: Facts) -> Iterator[str]:
    yield from (f"# {facts.title}", "", facts.about, "")
    yield from _usage(facts)
    if facts.inherited.notice:
        yield from (f"{facts.inherited.notice[0].upper()}{facts.inherited.notice[1:]}.", "")
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


def _usage(facts: Facts) -> Iterator[str]:
    """Yield the lines that show how the model is loaded; none if that is not known here."""
    lines = loading_code(
        facts.library, facts.config or {}, adapter=facts.relation == "adapter", base=facts.base_model, task=facts.task
    )
    if lines:
        yield from ("```python", *lines, "```", "")


def _shell(command: Sequence[str]) -> list[str]:
    return ["```bash", shlex.join(command), "```", ""]


def is_unedited(card: bytes) -> bool:
    """Return True if a README is a card as `render` wrote it, which a new card may replace."""
    match = MARK.search(card)
    return match is not None and xxhash.xxh3_128_hexdigest(card[: match.start()]).encode() == match[1]


def metadata_of(readme: Path) -> dict[str, Any]:
    """Return the front matter of a README; empty if there is none, or none that can be read."""
    try:
        with readme.open(encoding="utf-8") as file:
            return front_matter(file.read(1 << 20).encode())  # the start of a README of any size
    except (OSError, ValueError):
        return {}


def front_matter(readme: bytes) -> dict[str, Any]:
    """Return the front matter of a README's text, as `metadata_of` does."""
    if not readme.startswith(b"---") or not (match := _FRONT.match(readme)):
        return {}
    import yaml

    try:
        metadata = yaml.safe_load(match[1].decode())
    except Exception:  # noqa: BLE001 - YAML of any content: the new card does without
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(name, str) for name in metadata):
        return {}
    fields = {name: value for name, value in metadata.items() if value is not None}
    return fields | ({"tags": [fields["tags"]]} if isinstance(fields.get("tags"), str) else {})


@dataclass(frozen=True)
class Inherited:
    """The fields that a card takes from the cards of the works that the model is made of."""

    fields: Mapping[str, Any]
    notice: str | None = None
    """A sentence about licences that differ."""


def inherited(works: Mapping[str, Path]) -> Inherited:
    """Return the fields that a model inherits from some works: their folders, by role, the base first."""
    cards = {role: metadata_of(folder / NAME) for role, folder in works.items() if folder.is_dir()}
    if not any(cards.values()):
        return Inherited({})
    from .licences import Licence, explained, strictest

    licences = {role: found for role, metadata in cards.items() if (found := Licence.of(metadata))}
    licence = strictest(licences)
    fields: dict[str, Any] = {name: value for name, value in (licence or Licence(""))._asdict().items() if value}
    for name in LISTS:
        values = [_listed(metadata.get(name)) for metadata in reversed(cards.values())]
        if merged := list(dict.fromkeys(value for each in values for value in each)):
            fields[name] = merged[0] if len(merged) == 1 and name == "language" else merged
    return Inherited(fields, explained(licences, licence))


def _listed(value: object) -> list[str]:
    values = [value] if isinstance(value, str) else value
    return [each for each in values if isinstance(each, str)] if isinstance(values, list) else []


def base_repo(base: Checkpoint, adapters: Iterable[Adapter]) -> str | None:
    """Return the base's repo id: its own, or the one that an adapter gives if the base's name agrees."""
    if base.source.repo:
        return base.source.repo
    known = {base.source.name, str((base.config or {}).get("_name_or_path", "")).rstrip("/").rpartition("/")[2]}
    for name in (adapter.base for adapter in adapters):
        if name and REPO_ID.fullmatch(name) and name.rpartition("/")[2] in known and not Path(name).exists():
            return name
    return None


def pipeline_of(config: Mapping[str, Any] | None, metadata: Mapping[str, Any]) -> str | None:
    """Return the task of a model, from its architecture or else from the base's card."""
    for name in architectures(config or {}):
        for end, pipeline in PIPELINES.items():
            if name.endswith(end):
                return pipeline
    tag = metadata.get("pipeline_tag")
    return tag if isinstance(tag, str) else None


def works_of(plan: Plan) -> dict[str, Path]:
    """Return the folders of a merge's inputs, by role."""
    adapters = [adapter.source for adapter in plan.adapters]
    roles = ["adapter"] if len(adapters) == 1 else [f"adapter {source.name}" for source in adapters]
    return {"base": plan.base.source.path, **{role: source.path for role, source in zip(roles, adapters, strict=True)}}


def card_bytes(plan: Plan, base_model: str | None, fields: Inherited, checks: Sequence[tuple[str, str]] = ()) -> bytes:
    """Render README.md for a merge's OUT; `checks` are the rows of the self-check's table."""
    base, counts, names = plan.base, plan.counts(), [adapter.source for adapter in plan.adapters]
    metadata = {} if base.is_file else metadata_of(base.root / NAME)
    config = PIPELINE if base.is_pipeline else plan.output_config
    kinds = tuple(sorted({adapter.kind for adapter in plan.adapters}))
    undo = () if plan.options.undo == "none" else ("unmerge", "MERGED", *(each.title for each in names), "OUT")
    facts = Facts(
        title=f"{base.source.name} with {', '.join(source.name for source in names)}",
        about=f"{' and '.join(kinds)} folded into the weights of {base.source.name}. "
        f"{counts['merged']} tensors merged, {counts['replaced']} replaced, {counts['copied']} copied as they were.",
        kinds=kinds,
        relation="finetune",
        base_model=base_model or base_repo(base, plan.adapters),
        library=library_of(config),
        pipeline=pipeline_of(config, metadata),
        inherited=fields,
        config=config,
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
    for name, value in (
        ("--dtype", CONFIG_DTYPES.get(options.dtype or "")),
        ("--compute-dtype", "float32" if options.compute_dtype == "F32" else None),
        ("--max-shard-size", options.max_shard_size),
        ("--undo", options.undo if options.undo != "norms" else None),
        *((flag(many), each) for many in REPEATED for each in getattr(options, many)),
    ):
        words += [name, str(value)] if value else []
    words += " ".join(options.combination.words).split()
    words += QUANTISED.get(options.quantised, options.quantised.replace("as ", "--base-as ")).split()
    words += ["--legacy-config"] if options.legacy_config else []
    return [*words, "--allow-unmatched"] if options.allow_unmatched else words


def _number(value: float) -> str:
    """Write a number as people do, without loss of a digit."""
    return short if float(short := f"{value:g}") == value else repr(value)


def source_row(role: str, source: Source) -> tuple[str, str, str]:
    """Return one row of a card's table of inputs."""
    return role, source.repo or source.name, source.commit or ""
