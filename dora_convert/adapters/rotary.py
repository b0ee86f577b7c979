"""Put rows of q_proj and k_proj in order: Meta and torchtune alternate the halves of each head's rotary pairs."""

from __future__ import annotations

from ..errors import UnsupportedError
from ..storage.checkpoint import Checkpoint


def head_size(base: Checkpoint, outputs: int, module: str) -> int | None:
    """Return the number of rows of one head of q_proj or k_proj; None if the base's config does not say it."""
    for config in base.configs:
        if isinstance(size := config.get("head_dim"), int) and size:
            return size
        heads = config.get("num_attention_heads")
        own = config.get("num_key_value_heads") or heads if module.endswith(".k_proj") else heads
        if isinstance(own, int) and own and outputs % own == 0:
            return outputs // own
    return None


def heads_unknown(base: Checkpoint, module: str) -> UnsupportedError:
    """Return the error for a base whose config does not say the heads of a module."""
    return UnsupportedError(
        f"config.json of {base.source.name} does not say the size of the heads of {module}.",
        hint="num_attention_heads or head_dim in its config.json says it",
    )


def meta_rows(outputs: int, size: int) -> tuple[int, ...]:
    """Return, for each row in the Hub's order, the number of the row in Meta's order."""
    half = size // 2
    return tuple(
        head * size + 2 * pair + part for head in range(outputs // size) for part in range(2) for pair in range(half)
    )


def inverse(rows: tuple[int, ...]) -> tuple[int, ...]:
    """Return the inverse of a permutation."""
    back = [0] * len(rows)
    for position, row in enumerate(rows):
        back[row] = position
    return tuple(back)
