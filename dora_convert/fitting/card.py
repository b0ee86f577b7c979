"""The model card of an adapter that was made of others, or of two checkpoints."""

from __future__ import annotations

from .. import __version__
from ..output.card import NAME, Facts, inherited, metadata_of, pipeline_of, render, source_row
from .jobs import FittingPlan


def adapter_card_bytes(order: FittingPlan, base_model: str | None) -> bytes:
    """README.md for an adapter that was made of others, or of two checkpoints."""
    base, kind = order.bases[0], "DoRA" if order.makes_dora else "LoRA"
    metadata = {} if base.is_file else metadata_of(base.root / NAME)
    roles = ("base", *(["tuned"] if len(order.bases) > 1 else []), *(["adapter"] if order.like else []))
    facts = Facts(
        title=f"{kind} of {order.sources[-1].name}",
        about=f"A {kind} adapter for {base.source.name}.",
        kinds=(kind,),
        relation="adapter",
        base_model=base_model or base.source.repo,
        library=order.format.LIBRARY,
        pipeline=pipeline_of(base.config, metadata),
        inherited=inherited(metadata),
        sources=tuple(source_row(role, source) for role, source in zip(roles, order.sources, strict=True)),
        made_by=f"`{order.command}` of dora-convert {__version__}",
        command=("dora-convert", order.command, *order.words),
    )
    return render(facts)
