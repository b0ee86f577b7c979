"""Write llama.cpp's LoRA adapters: one alpha for all tensors, which llama.cpp divides by each tensor's rank.

If one alpha cannot say all scalings, they are folded into `lora_b`, and alpha is 0, which stands for a scaling of 1.
"""

from __future__ import annotations

import re

from ...adapters import Adapter, Change
from ...adapters.new_adapter import Files, NewAdapter, ShapedTensor
from ...adapters.rotary import head_size, heads_unknown, inverse, meta_rows
from ...adapters.writing import HINT, RowFactors, factors_of, matrices, shaped
from ...errors import UnsupportedError, UsageError
from ...storage.stored_view import view
from .names import ARCHITECTURES, OUTSIDE, PERMUTED, ROTARY, modules_of

WEIGHTS = "adapter.gguf"
LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)")


def save(new: NewAdapter) -> Files:
    """Return the file; UnsupportedError for DoRA and for modules that llama.cpp lacks, UsageError without a base."""
    found = factors_of(new, "gguf", dora=False, embeddings=True)
    architecture = _architecture(new)
    alphas = {each.low.scale * each.low.rank for each in found}
    folded = len(alphas) > 1 or not all(alphas)
    tensors: dict[str, ShapedTensor] = {}
    for each in found:
        A, B = (view(each.low.A, turned=True), each.low.B) if each.low.transposed else matrices(each.low)
        name = f"{own_name(each.module, architecture)}.weight"
        if architecture in PERMUTED and each.module.endswith(ROTARY):
            B = view(B, _rows(new, each))
        tensors[f"{name}.lora_a"] = shaped(A, A.shape)
        tensors[f"{name}.lora_b"] = shaped(B, B.shape, each.low.scale if folded else 1.0)
    pairs = {
        "general.type": "adapter",
        "general.architecture": architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": repr(0.0 if folded else alphas.pop()),
    }
    return Files(WEIGHTS, tensors, {}, metadata=pairs, folded=folded)


def _architecture(new: NewAdapter) -> str:
    """Return llama.cpp's name of the base's architecture."""
    if not new.model:
        raise UsageError("llama.cpp's names depend on the base.", hint="--base BASE")
    known = {ARCHITECTURES[kind] for kind in new.model.model_types if kind in ARCHITECTURES}
    if len(known) != 1:
        kinds = ", ".join(sorted(new.model.model_types)) or "a model without config.json"
        raise UnsupportedError(
            f"GGUF adapters for {kinds} are not written yet.", hint="convert to peft, then llama.cpp's convert_lora"
        )
    return known.pop()


def _rows(new: NewAdapter, each: RowFactors) -> tuple[int, ...]:
    assert new.model
    outputs = each.low.outputs
    if not (size := head_size(new.model, outputs, each.module)):
        raise heads_unknown(new.model, each.module)
    return inverse(meta_rows(outputs, size))


def own_name(module: str, architecture: str) -> str:
    """Return llama.cpp's name of a module."""
    match, names = LAYER.fullmatch(module), modules_of(architecture)
    if match and match[2] in names:
        return f"blk.{match[1]}.{names[match[2]]}"
    if own := OUTSIDE.get(module.replace("language_model.", "")):
        return own
    raise UnsupportedError(f"{module} has no name in llama.cpp's {architecture} that is known here.", hint=HINT)


def objection(change: Change, tensor: str, like: Adapter) -> str | None:  # noqa: ARG001 - as all writers
    """Return why a LoRA cannot be a DoRA in this format."""
    return "llama.cpp has no DoRA"


def shares_rank(change: Change, tensor: str, like: Adapter) -> str | None:  # noqa: ARG001 - as all writers
    """Return why a weight's factors must keep their rank; None if they need not."""
    return None
