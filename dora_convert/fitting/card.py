"""Write the files beside a fitted adapter's weights: its model card, and the tokenizer of its last input."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..output.card import (
    NAME,
    REPO_ID,
    Facts,
    Inherited,
    base_repo,
    inherited,
    metadata_of,
    pipeline_of,
    render,
    source_row,
)  # fmt: skip
from ..output.folder import OutputFolder
from ..output.side_files import tokenizer_files
from ..output.usage import PIPELINE, library_of
from ..settings import Settings, __version__
from ..storage.refs import Source
from .jobs import FittingPlan


def put_side_files(plan: FittingPlan, folder: OutputFolder, settings: Settings) -> None:
    """Write the model card, and the tokenizer of the last input."""
    source = plan.sources[-1].path
    for name in tokenizer_files(source) if source.is_dir() else ():
        folder.put(name, source / name)
    roles = list(("base", "tuned")[: len(plan.bases)])
    roles += ["adapter"] if plan.like else []
    roles += [f"adapter {number}" for number in range(2, 2 + len(plan.others))]
    works = dict(zip(roles, plan.sources, strict=True))
    fields = inherited({role: work.path for role, work in works.items()})
    if fields.notice:
        settings.notify(fields.notice)
    folder.put(NAME, _card(plan, works, settings.base_model, fields))


def _card(plan: FittingPlan, works: Mapping[str, Source], base_model: str | None, fields: Inherited) -> bytes:
    """Return the model card; `works` are the inputs by role."""
    base, kind = next(iter(plan.bases), None), "DoRA" if plan.is_dora else "LoRA"
    metadata = {} if not base or base.is_file else metadata_of(base.root / NAME)
    config = None if not base else PIPELINE if base.is_pipeline else base.config
    adapters, library = plan.adapters, plan.format.LIBRARY
    is_strange = library == "diffusers" and library_of(config) == "transformers"  # a text model for an image tool
    named = base.source.name if base else _last_name(plan.like.base if plan.like else None)
    facts = Facts(
        title=f"{kind} of {' and '.join(each.name for each in plan.sources[-1 - len(plan.others) :])}",
        about=f"A {kind} adapter for {named}.",
        kinds=(kind,),
        relation="adapter",
        base_model=base_model or (base_repo(base, adapters) if base else None),
        library=None if is_strange else library,
        pipeline=pipeline_of(config, metadata),
        inherited=fields,
        config=config,
        task=next((each.task for each in adapters if each.task), None),
        sources=tuple(source_row(role, source) for role, source in works.items()),
        made_by=f"`{plan.command}` of dora-convert {__version__}",
        command=("dora-convert", plan.command, *plan.words),
    )
    return render(facts)


def _last_name(base: str | None) -> str:
    """Return the name of a base for a card: a repo id, or the last name of a path."""
    if base and not REPO_ID.fullmatch(base):
        base = re.split(r"[\\/]", base.rstrip("\\/"))[-1]
    return base or "its base"
