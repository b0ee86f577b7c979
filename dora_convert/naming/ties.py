"""Tied embeddings: one weight that serves as input embedding and as output head.

An adapter that changes one side only makes two weights of it: the model was trained with the other side as it was.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import StoredTensor

EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings"})
"""What modules call their input embedding."""
HEADS = ("lm_head", "embed_out", "proj_out", "cls.predictions.decoder", "lm_head.decoder", "vocab_projector")
"""What models call the head that may be tied to it."""
HEADLESS = ("Model", "Classification", "QuestionAnswering", "MultipleChoice", "Regression", "Detection")
"""How the names of architectures without such a head end."""
OTHER_HEADS = {
    "bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "xlm-roberta": "lm_head.decoder",
    "camembert": "lm_head.decoder", "distilbert": "vocab_projector", "whisper": "proj_out",
}  # fmt: skip
"""What the head is called where it is not `lm_head`, by model type."""
SCALED = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct"})
"""Model types that compute otherwise where the head is tied, so that untying it changes more than weights."""


@dataclass(frozen=True)
class Tie:
    """The tensors at both ends, and why an adapter on them cannot be merged, if so."""

    embedding: str
    head: str
    stored: bool = False
    """Whether the head is on disk, too."""
    refusal: str | None = None


def find_tie(base: Checkpoint, tasks: Collection[str] = ()) -> Tie | None:
    """How a base's head is tied to its input embedding, or None where it is not.

    `tasks` are the classes of models, or the ends of their names, that the base was trained inside: bare models have no
    head of their own.

    A config that says nothing means tied, which is transformers' default, for architectures that have a head and
    checkpoints that have none, or the same bytes under both names.
    """
    heads = [name for name in base.tensors if is_head(name)]
    embeddings = [name for name in base.tensors if is_embedding(name)]
    if not (base.config and embeddings):
        return None
    embedding = min(embeddings, key=len)
    shared = any(_same_place(base.tensors[embedding], base.tensors[head]) for head in heads)
    if not _says_tied(base, tasks, default=shared or not heads):
        return None
    head = heads[0] if heads else _head_of(embedding, base)
    refusal = None
    if base.model_types & SCALED or embedding.endswith("shared.weight"):
        refusal = f"{embedding} is tied to more than the output head; adapters on it are not merged"
    elif len(embeddings) > 1 or len(heads) > 1:
        refusal = "the base has several embeddings or heads that may be tied; adapters on them are not merged"
    return Tie(embedding, head, bool(heads), refusal)


def _same_place(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two names are for the same bytes, as in files that torch.save wrote."""
    return (one.path, one.start) == (other.path, other.start)


def _says_tied(base: Checkpoint, tasks: Collection[str], *, default: bool) -> bool:
    found = (config.get("tie_word_embeddings") for config in base.configs)
    flags = [flag for flag in found if isinstance(flag, bool)]
    architectures = (base.config or {}).get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if any(map(_has_head, tasks)):
        names = [name for name in names if _has_head(name)] or list(tasks)
    return (flags[0] if flags else default and bool(names)) and all(map(_has_head, names))


def _has_head(name: str) -> bool:
    """Whether models of a class predict tokens."""
    return name.endswith("HeadModel") or not name.endswith(HEADLESS)


def _head_of(embedding: str, base: Checkpoint) -> str:
    """The name that a head has which is not on disk."""
    known = [module for kind, module in OTHER_HEADS.items() if kind in base.model_types]
    prefix, nested, _ = embedding.partition("language_model.model.")
    return f"{prefix}language_model.lm_head.weight" if nested else f"{[*known, 'lm_head'][0]}.weight"


def is_embedding(tensor: str) -> bool:
    """Whether a tensor is an input embedding, by its module's name."""
    module, _, leaf = tensor.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in EMBEDDINGS


def is_head(tensor: str) -> bool:
    """Whether a tensor is an output head's weight, by its module's name."""
    return f".{tensor}".endswith(tuple(f".{head}.weight" for head in HEADS))
