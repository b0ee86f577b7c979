"""Find the weights that an adapter's config says were trained, and that the adapter lacks."""

from __future__ import annotations

import re

from ..adapters.adapter import Adapter, Full, Update
from ..naming.families import COUNTS, LAYERS, TABLES
from ..naming.resolve import NameResolver, Tie, is_embedding, is_head
from ..storage.checkpoint import Checkpoint
from .options import Options

SHOWN = 10
"""Names in a warning."""
EXPERTS = ".experts."


def find_missing(
    adapter: Adapter, names: NameResolver, base: Checkpoint, tie: Tie | None, options: Options
) -> list[str]:
    """Return the missing weights, sorted, by the adapter's names.

    Weights that the caller leaves out do not count, nor layers past the model's last one, which train only the
    base itself, nor experts if the adapter has none: running models hold them in other modules.
    """
    if not adapter.promised:
        return []
    shapes = {own: tensor.shape for name, tensor in base.tensors.items() if (own := names.in_adapter(name))}
    changes = [change for change in adapter.changes if not _is_frozen(change.update)]
    targets = [target for change in changes for target in (change.target, *change.among)]
    covered = {names.find(target) for target in targets}
    if tie and covered & {tie.embedding, tie.head}:
        covered |= {tie.embedding, tie.head}
    has_experts = any(EXPERTS in target for target in targets)
    return sorted(
        name
        for name in set(adapter.promised(shapes, lambda name: len(shapes[name]) == 2 and _is_linear(name)))
        if names.find(name) not in covered
        and options.selects(name.rpartition(".")[0])
        and (has_experts or EXPERTS not in name)
        and not _is_past_the_last_layer(name, base)
    )


def _is_frozen(update: Update) -> bool:
    """Return True for a tensor of the base that was saved beside its factors, which says nothing of training."""
    return isinstance(update, Full) and update.copied


def _is_linear(name: str) -> bool:
    module = name.removesuffix(".weight").rpartition(".")[2]
    return name.endswith(".weight") and not (is_embedding(name) or is_head(name) or module in TABLES)


def _is_past_the_last_layer(name: str, base: Checkpoint) -> bool:
    counts = [count for config in base.configs for key in COUNTS if isinstance(count := config.get(key), int)]
    layer = re.match(LAYERS, name)
    return bool(counts and layer) and int(layer["number"]) >= max(counts)  # type: ignore[index] # bool
