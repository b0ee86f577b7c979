"""Write the model card of a fitted adapter."""

from __future__ import annotations

from pathlib import Path

from .. import __version__
from ..output.card import NAME, Facts, Inherited, base_repo, metadata_of, pipeline_of, render, source_row
from .jobs import FittingPlan


def works_of(plan: FittingPlan) -> dict[str, Path]:
    """Return the folders of a fitted adapter's inputs, by role."""
    return dict(zip(_roles(plan), (source.path for source in plan.sources), strict=True))


def _roles(plan: FittingPlan) -> tuple[str, ...]:
    return ("base", *(["tuned"] if len(plan.bases) > 1 else []), *(["adapter"] if plan.like else []))


def adapter_card_bytes(plan: FittingPlan, base_model: str | None, fields: Inherited) -> bytes:
    """Return README.md for a fitted adapter."""
    base, kind = plan.bases[0], "DoRA" if plan.is_dora else "LoRA"
    metadata = {} if base.is_file else metadata_of(base.root / NAME)
    facts = Facts(
        title=f"{kind} of {plan.sources[-1].name}",
        about=f"A {kind} adapter for {base.source.name}.",
        kinds=(kind,),
        relation="adapter",
        base_model=base_model or base_repo(base, [plan.like] if plan.like else []),
        library=plan.format.LIBRARY,
        pipeline=pipeline_of(base.config, metadata),
        inherited=fields,
        config=base.config,
        sources=tuple(source_row(role, source) for role, source in zip(_roles(plan), plan.sources, strict=True)),
        made_by=f"`{plan.command}` of dora-convert {__version__}",
        command=("dora-convert", plan.command, *plan.words),
    )
    return render(facts)
