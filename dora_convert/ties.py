"""Tied embeddings: one stored tensor that serves as input embedding and as output head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checkpoint import Checkpoint

EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings"})
"""What modules call their input embedding."""
HEADS = ("lm_head", "embed_out", "proj_out", "cls.predictions.decoder", "lm_head.decoder", "output")
"""What models call the head that may be tied to it."""
HEADLESS = ("Model", "Classification", "QuestionAnswering", "MultipleChoice", "Regression", "Detection")
"""How the names of architectures without such a head end."""


def is_tied(base: Checkpoint) -> bool:
    """Whether the base's head is its input embedding.

    A config that says nothing means yes, which is transformers' default, for architectures that have a head.
    """
    if base.config is None or any(name.endswith(f"{head}.weight") for head in HEADS for name in base.tensors):
        return False
    flags = [found for found in _flags(base.config) if isinstance(found, bool)]
    architectures = base.config.get("architectures") or []
    headless = any(
        str(name).endswith(HEADLESS) and not str(name).endswith("HeadModel") for name in architectures
    )
    return (flags[0] if flags else bool(architectures)) and not headless


def _flags(config: Mapping[str, Any]) -> list[Any]:
    """Every `tie_word_embeddings`, the outermost first."""
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    own = [config["tie_word_embeddings"]] if "tie_word_embeddings" in config else []
    return own + [flag for value in nested for flag in _flags(value)]


def is_embedding(tensor: str) -> bool:
    """Whether a tensor is an input embedding, by its module's name."""
    return tensor.rpartition(".")[0].rpartition(".")[2] in EMBEDDINGS
