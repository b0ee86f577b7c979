"""Open inputs that only a combination takes: the links of a chain, and fine-tuned checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..adapters import Adapter, Change, Full
from ..errors import RefError
from ..formats.detect import detect, is_only_adapter, model_weights, wanted_of_adapter
from ..naming.resolve import find_tie
from ..storage.checkpoint import Checkpoint, open_checkpoint
from ..storage.refs import HubRef, Source, local_source, parse_ref
from ..storage.safetensors import FLOATS
from . import Session

CHECKPOINT = "checkpoint"
"""The format of a fine-tuned checkpoint that is combined as if it were an adapter."""


def adapter_below(name: str, revision: str | None, links: Sequence[Adapter], session: Session) -> Source | None:
    """Return the adapter that the first of some links names as its base; None if the name is a model's.

    Raises RefError for a chain that comes back to one of the links.
    """
    source = _only_adapter(name, revision, session)
    if source and any(source.path.resolve() == link.source.path.resolve() for link in links):
        raise RefError(f"The chain of {links[-1].source.name} comes back to {source.name}.", hint="name BASE")
    if source:
        session.notify(f"chain: {links[0].source.name} was trained on {source.title}, an adapter")
    return source


def _only_adapter(name: str, revision: str | None, session: Session) -> Source | None:
    """Return an adapter without a model beside it; of a Hub repo, only an adapter's files are downloaded."""
    ref = parse_ref(name, "BASE")
    if not isinstance(ref, HubRef):
        return local_source(ref) if is_only_adapter(ref) else None
    from .download import fetch

    def wanted(names: Sequence[str]) -> list[str]:
        return wanted_of_adapter(names) if is_only_adapter(names) else []

    source = fetch(replace(ref, revision=ref.revision or revision), "BASE", wanted, session)
    return source if source.path.is_dir() and is_only_adapter(source.path) else None


def find_tuned(ref: str, session: Session) -> Source | None:
    """Return the folder of a fine-tuned checkpoint; None if the folder or the repo holds an adapter, or neither."""
    parsed = parse_ref(ref, "ADAPTER")
    if not isinstance(parsed, HubRef):
        is_model = parsed.is_dir() and not detect(parsed) and bool(model_weights(parsed))
        return local_source(parsed) if is_model else None
    from .download import fetch, wanted_of_base

    def wanted(names: Sequence[str]) -> list[str]:
        return [] if detect(names) or not model_weights(names) else wanted_of_base(names)

    source = fetch(parsed, "ADAPTER", wanted, session)
    return source if source.path.is_dir() and not detect(source.path) and model_weights(source.path) else None


def read_tuned(source: Source) -> Adapter:
    """Return a checkpoint of the base's shapes as an adapter: each floating tensor is a change, W' = value.

    Raises RefError for a quantised checkpoint.
    """
    tuned = open_checkpoint(source)
    if any("quantization_config" in config for config in tuned.configs):
        raise RefError(f"TUNED {source.name} is quantised: its changes are not known.", hint="name the original")
    floats = {name: tensor for name, tensor in tuned.tensors.items() if tensor.dtype in FLOATS}
    return Adapter(
        source=source,
        format=CHECKPOINT,
        kind="checkpoint",
        changes=tuple(Change(name, Full(tensor)) for name, tensor in floats.items()),
        tensors=floats,
        files=tuple(dict.fromkeys(tensor.path for tensor in tuned.tensors.values())),
        ignored=dict.fromkeys(tuned.tensors.keys() - floats.keys(), "not a floating tensor: the base's stays"),
        keeps_ties=find_tie(tuned) is not None,
        states=tuned.states,
    )


def untouched(base: Checkpoint, adapters: Sequence[Adapter]) -> list[str]:
    """Return warnings about checkpoints that lack tensors of the base."""
    notes = []
    for adapter in adapters:
        lacking = base.tensors.keys() - adapter.tensors.keys() - adapter.ignored.keys()
        if adapter.format == CHECKPOINT and lacking:
            shown = ", ".join(sorted(lacking)[:5]) + (" …" if len(lacking) > 5 else "")
            notes.append(f"{adapter.source.name} lacks {len(lacking)} tensors of the base, which stay: {shown}")
    return notes
