"""Tied embeddings: find out if one weight serves as input embedding and as output head.

An adapter that changes one side only makes two weights of the one: training left the other side as it was.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import StoredTensor
from .families import EMBEDDINGS, HEADLESS, HEADS, OTHER_HEADS, SCALED


@dataclass(frozen=True)
class Tie:
    """The names of a tied embedding and head."""

    embedding: str
    head: str
    stored: bool = False
    """True if the head is on disk, too."""
    refusal: str | None = None
    """The reason if adapters on either tensor cannot be merged."""


def find_tie(base: Checkpoint, tasks: Collection[str] = ()) -> Tie | None:
    """Return the tie between a base's head and its input embedding; None if they are two weights.

    `tasks` are model classes, or ends of their names, that the base was trained inside: a bare model has no
    head of its own.

    Without a flag in the config, transformers' default holds: tied, if the architecture has a head and the
    checkpoint has none, or has the same bytes under both names.
    """
    heads = [name for name in base.tensors if is_head(name)]
    embeddings = [name for name in base.tensors if is_embedding(name)]
    if not (base.config and embeddings):
        return None
    embedding = min(embeddings, key=len)
    shared = any(_same_bytes(base.tensors[embedding], base.tensors[head]) for head in heads)
    if not _says_tied(base, tasks, default=shared or not heads):
        return None
    head = heads[0] if heads else _absent_head(embedding, base)
    refusal = None
    if base.model_types & SCALED or embedding.endswith("shared.weight"):
        refusal = f"{embedding} is tied to more than the output head; adapters on it are not merged"
    elif len(embeddings) > 1 or len(heads) > 1:
        refusal = "the base has several embeddings or heads that may be tied; adapters on them are not merged"
    return Tie(embedding, head, bool(heads), refusal)


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Return True if two names are for the same bytes, as in files that torch.save wrote."""
    return (one.path, one.start) == (other.path, other.start)


def _says_tied(base: Checkpoint, tasks: Collection[str], *, default: bool) -> bool:
    """Return True if the config ties them, for architectures that have a head."""
    values = (config.get("tie_word_embeddings") for config in base.configs)
    flags = [flag for flag in values if isinstance(flag, bool)]
    architectures = (base.config or {}).get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if any(map(_has_head, tasks)):
        names = [name for name in names if _has_head(name)] or list(tasks)
    return (flags[0] if flags else default and bool(names)) and all(map(_has_head, names))


def _has_head(architecture: str) -> bool:
    """Return True if models of a class predict tokens."""
    return architecture.endswith("HeadModel") or not architecture.endswith(HEADLESS)


def _absent_head(embedding: str, base: Checkpoint) -> str:
    """Return the name of a head that is not on disk."""
    prefix, nested, _ = embedding.partition("language_model.model.")
    if nested:
        return f"{prefix}language_model.lm_head.weight"
    modules = (module for family, module in OTHER_HEADS.items() if family in base.model_types)
    return f"{next(modules, 'lm_head')}.weight"


def is_embedding(tensor: str) -> bool:
    """Return True if a tensor is an input embedding, by its module's name."""
    module, _, leaf = tensor.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in EMBEDDINGS


def is_head(tensor: str) -> bool:
    """Return True if a tensor is an output head's weight, by its module's name."""
    return f".{tensor}".endswith(tuple(f".{head}.weight" for head in HEADS))
