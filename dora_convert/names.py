"""From adapter module names to slots: which stored tensor an update means, and which way round it lies.

Names on disk are taken to be the module names, which holds for most models; families where it does not are listed in
`RENAMED` and refused as soon as a name fails to match.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from .adapter import Change
from .checkpoint import Checkpoint
from .slots import Slot
from .stored import FLOATS, Stored
from .ties import HEADS, is_embedding, is_tied
from .updates import Decomposed, Full, LowRank, low_rank

RENAMED = frozenset(
    {
        "mixtral", "minimax", "minimax_m2", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2",
        "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "olmoe", "flex_olmo", "dots1",
        "ernie4_5_moe", "hunyuan_v1_moe", "exaone_moe", "cohere2_moe", "longcat_flash", "solar_open", "afmoe",
        "qwen3_omni_moe", "qwen3_5_moe", "jamba", "nemotron_h", "lfm2_moe", "granitemoe", "granitemoeshared",
        "granitemoehybrid", "qwen3_vl_moe", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "llava", "llava_next",
        "llava_next_video", "llava_onevision", "gemma3", "mistral3", "paligemma", "internvl", "aya_vision", "aria",
        "got_ocr2", "vipllava", "mllama", "fuyu", "video_llava", "emu3", "gemma3n", "gemma3n_text", "qwen3_5_text",
        "gpt_neox", "gpt2", "bloom",
    }
)  # fmt: skip
"""Model types whose tensors may be called something else on disk than in the running model (transformers 5)."""

CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
"""Where transformers uses its Conv1D, whose weight is (in, out): needed for square weights, which do not tell."""


FEW = 5000
"""Modules to look for similar names among: the search takes milliseconds a thousand."""


@dataclass(frozen=True)
class Misfit:
    """Why an update has no slot; `unmatched` when there is no tensor of that name at all."""

    why: str
    unmatched: bool = False


def place(change: Change, base: Checkpoint) -> Slot | Misfit:
    """The slot of one change in a base, or why it has none."""
    tensor = base.tensors.get(change.target)
    if tensor is None:
        return Misfit(explain_missing(change.target, base), unmatched=True)
    if is_embedding(change.target) and is_tied(base):
        return Misfit(
            f"{change.target} is tied to the output head; adapters on tied weights are not merged yet"
        )
    if tensor.dtype not in FLOATS:
        return Misfit(f"{change.target} is stored as {tensor.dtype}; quantised weights are not merged yet")
    if isinstance(change.update, Full):
        return _place_full(change.update.value, tensor)
    return _place_low_rank(change.update, tensor, base)


def _place_full(value: Stored, tensor: Stored) -> Slot | Misfit:
    if value.dtype not in FLOATS:
        return Misfit(f"is saved as {value.dtype}, but {tensor.name} is {tensor.dtype}")
    if value.shape == tensor.shape:
        return Slot(tensor)
    if value.shape[1:] == tensor.shape[1:]:
        return Misfit(
            f"has {value.shape[0]} rows for the base's {tensor.shape[0]}: resized tensors are not merged yet"
        )
    return Misfit(f"has shape {value.shape}; {tensor.name} has {tensor.shape}")


def _place_low_rank(update: LowRank | Decomposed, tensor: Stored, base: Checkpoint) -> Slot | Misfit:
    """Match factor shapes to the stored weight; square weights are told apart by the model's type."""
    low = low_rank(update)
    A, B, shape = low.A.shape, low.B.shape, tensor.shape
    if isinstance(update, Decomposed) and update.m.numel != B[0]:
        return Misfit(f"its magnitude has {update.m.numel} elements for {B[0]} outputs")
    straight = shape == (B[0], *A[1:]) and B[2:] == (1,) * (len(A) - 2)
    turned = len(A) == len(B) == 2 and shape == (A[1], B[0])
    if low.transposed is not None:
        straight, turned = straight and not low.transposed, turned and low.transposed
    if straight and turned:
        turned = is_conv1d(tensor.name, base)
        straight = not turned
    if straight or turned:
        return Slot(tensor, transposed=turned)
    return Misfit(f"lora_A {A} and lora_B {B} do not make its weight of shape {shape}")


def is_conv1d(tensor: str, base: Checkpoint) -> bool:
    """Whether transformers keeps a weight as Conv1D, by the model's type and the module's name."""
    return bool(base.model_types & CONV1D_MODELS) and tensor.split(".")[-2] in CONV1D_MODULES


def explain_missing(target: str, base: Checkpoint) -> str:
    """Why the base has no tensor of that name: another layout, a tied head, or a typo with its nearest names."""
    module, _, leaf = target.rpartition(".")
    if f"{module}.in_proj_weight" in base.tensors:
        return "is a MultiheadAttention, which is not merged yet"
    if module.endswith(HEADS) and is_tied(base):
        return f"the base ties {target} to its embedding; adapters on tied weights are not merged yet"
    if found := sorted(base.model_types & RENAMED):
        return f"{found[0]} checkpoints name tensors otherwise than modules; not matched yet"
    siblings = base.modules.get(module.rpartition(".")[0], ())
    if module in siblings:
        return f"the base's {module} has no {leaf}"
    return f"no such module; closest: {', '.join(closest(module, siblings, base)) or 'none'}"


def closest(module: str, siblings: Sequence[str], base: Checkpoint) -> list[str]:
    """Up to three module names like a missing one: its siblings first, else the most similar."""
    leaf = module.rpartition(".")[2]
    if leaf != module and siblings:
        leaves = [name.rpartition(".")[2] for name in siblings]
        return [f"…{name}" for name in difflib.get_close_matches(leaf, leaves, 3, 0)]
    modules = [name for found in base.modules.values() for name in found]
    return difflib.get_close_matches(module, modules[:FEW], 3, 0.5)
