"""Write diffusers' LoRA files: dotted names, `lora_A` and `lora_B`, and magnitudes without `.weight`.

Scalings are folded into `lora_B`, so that alpha is the rank in every reader, with the header's metadata or without.
"""

from __future__ import annotations

from ...adapters import Adapter, Change
from ...adapters.new_adapter import Files, NewAdapter, ShapedTensor
from ...adapters.writing import factors_of, matrices, shaped

WEIGHTS = "pytorch_lora_weights.safetensors"
DEFAULT = "transformer"
COMPONENTS = ("unet", "transformer", "text_encoder", "prior")


def save(new: NewAdapter) -> Files:
    """Return the file; UnsupportedError for changes that are neither LoRA nor DoRA by rows."""
    found = factors_of(new, "diffusers")
    folded = any(each.low.scale != 1 for each in found)
    tensors: dict[str, ShapedTensor] = {}
    for each in found:
        A, B = matrices(each.low)
        name = component_name(each.module)
        tensors[f"{name}.lora_A.weight"] = shaped(A, (*A.shape, *each.kernel))
        tensors[f"{name}.lora_B.weight"] = shaped(B, (*B.shape, *each.kernel), each.low.scale)
        if each.m:
            ones = (1,) * (len(A.shape) - 2 + len(each.kernel))
            rows = (1, each.m.numel, *ones) if ones else (each.m.numel,)
            tensors[f"{name}.lora_magnitude_vector"] = shaped(each.m, rows)
    return Files(WEIGHTS, dict(sorted(tensors.items())), {}, folded=folded)


def component_name(module: str) -> str:
    """Return a module's name with its component in front."""
    if "/" in module:
        return module.replace("/", ".", 1)
    return module if module.startswith(COMPONENTS) else f"{DEFAULT}.{module}"


def objection(change: Change, tensor: str, like: Adapter) -> str | None:  # noqa: ARG001 - as all writers
    """Return why diffusers cannot load a LoRA as a DoRA; None if it can."""
    return None


def shares_rank(change: Change, tensor: str, like: Adapter) -> str | None:  # noqa: ARG001 - as all writers
    """Return why a weight's factors must keep their rank; None if they need not."""
    return None
