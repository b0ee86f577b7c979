"""Write mlx-lm's adapters, as today's mlx-lm loads them: one rank, one scale, and the same modules in every layer.

Factors are turned. Ranks are padded with zeros. If scalings differ, they are folded into `lora_b`.
"""

from __future__ import annotations

import json

from ...adapters import Adapter, Change
from ...adapters.new_adapter import Files, NewAdapter, ShapedTensor
from ...adapters.writing import HINT, factors_of, layers_of, matrices, one_scale, shaped
from ...errors import UnsupportedError
from ...storage.stored_view import view

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


def save(new: NewAdapter) -> Files:
    """Return the files; UnsupportedError for embeddings, convolutions, and layers with other modules than the rest."""
    found = factors_of(new, "mlx")
    rank, scale, folded = one_scale(found)
    tensors: dict[str, ShapedTensor] = {}
    for each in found:
        A, B = matrices(each.low)
        if len(A.shape) > 2:
            raise UnsupportedError(f"{each.module} is a convolution, which mlx-lm does not adapt.", hint=HINT)
        own = each.low.scale if folded else 1.0
        tensors[f"{each.module}.lora_a"] = shaped(view(A, turned=True), (A.shape[1], rank))
        tensors[f"{each.module}.lora_b"] = shaped(view(B, turned=True), (rank, B.shape[0]), own)
        if each.m:
            tensors[f"{each.module}.m"] = shaped(each.m, (each.m.numel,))
    layers = layers_of([each.module for each in found])
    keys = next(iter(layers.values()))
    if any(other != keys for other in layers.values()) or sorted(layers) != list(range(len(layers))):
        raise UnsupportedError("mlx-lm adapts the same modules in all layers; here layers differ.", hint=HINT)
    config = {
        "model": new.base,
        "fine_tune_type": "dora" if found[0].m else "lora",
        "num_layers": len(layers),
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
    }
    text = json.dumps(config, indent=4, ensure_ascii=False) + "\n"
    return Files(WEIGHTS, dict(sorted(tensors.items())), {CONFIG: text.encode()}, folded=folded)


def objection(change: Change, tensor: str, like: Adapter) -> str | None:  # noqa: ARG001 - as all writers
    """Return why mlx-lm cannot load a LoRA as a DoRA; None if it can."""
    return None


def shares_rank(change: Change, tensor: str, like: Adapter) -> str | None:  # noqa: ARG001 - as all writers
    """Return why a weight's factors must keep their rank; None if they need not."""
    return None
