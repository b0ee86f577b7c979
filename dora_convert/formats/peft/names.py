"""Read PEFT's names of tensors: which module a tensor belongs to, and which part of it the tensor is.

PEFT puts its own words at the front and at the end of a name, and right after the name of a wrapped module. A
module of the model may be called by any of these words, so they count nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from ...adapters.adapter import WRAPPERS

PREFIX = "base_model.model."
PARTS: Mapping[str, str] = {
    ".lora_A.weight": "A", ".lora_A": "A", ".lora_B.weight": "B", ".lora_B": "B", ".lora_embedding_A": "A",
    ".lora_embedding_B": "B", ".lora_magnitude_vector": "m", ".lora_magnitude_vector.weight": "m",
    ".lora_E": "d", ".lora_diag": "d", ".lora_B.bias": "b",
}  # fmt: skip
"""A part of a module's update, by the end of a tensor's name."""
TOKENS = (".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")
TOKENS_BASE = ".token_adapter.base_layer.weight"
_FRONT = re.compile(rf"((?:{'|'.join(WRAPPERS)})\.)*{re.escape(PREFIX)}")
_DEFAULT = re.compile(r"\.default(?=(\.weight|\.bias)?$)")
"""The adapter's name, which PEFT takes out when it saves and other programs leave in."""
_SAVED = re.compile(r"(.+)\.(modules_to_save(?:\.default)?|original_module)(\..+)")


def plain(name: str) -> str:
    """Return a tensor's name without PEFT's prefix and without the adapter's name."""
    name = name[match.end() :] if (match := _FRONT.match(name)) else name
    bare = _DEFAULT.sub("", name)
    return bare if not part_of(name)[1] and part_of(bare)[1] else name


def part_of(name: str) -> tuple[str, str]:
    """Return the module of a plain name, and the end that PEFT added; "" for a tensor of the model itself."""
    end = next((end for end in (*PARTS, *TOKENS, TOKENS_BASE) if name.endswith(end)), "")
    return name.removesuffix(end), end


def wrapped_whole(name: str) -> tuple[str, str, str] | None:
    """Return the module, PEFT's word and the rest of a name that may be of a module saved whole."""
    return match.groups() if (match := _SAVED.fullmatch(name)) else None  # type: ignore[return-value] # three groups


def in_model(name: str, wrapped: Collection[str]) -> str:
    """Return the model's own name of a tensor that a trainer named as the running PEFT model does."""
    target = plain(name)
    whole = wrapped_whole(target)
    return without_base_layer(whole[0] + whole[2] if whole else target, wrapped)


def without_base_layer(name: str, wrapped: Collection[str]) -> str:
    """Return a name without each `base_layer` that follows the name of a wrapped module."""
    parts = name.split(".")
    kept = [part for k, part in enumerate(parts) if not (part == "base_layer" and ".".join(parts[:k]) in wrapped)]
    return ".".join(kept)
