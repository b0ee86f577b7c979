"""PEFT's names: of its files, and of the tensors in them."""

from __future__ import annotations

import re

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into names."""
DEFAULT = re.compile(r"\.modules_to_save(\.default)?(?=\.)|\.default(?=\.|$)")
"""The adapter's name, which PEFT takes out when it saves and other savers leave in."""

PARTS = {
    ".lora_A.weight": "A", ".lora_A": "A", ".lora_B.weight": "B", ".lora_B": "B", ".lora_embedding_A": "A",
    ".lora_embedding_B": "B", ".lora_magnitude_vector": "m", ".lora_magnitude_vector.weight": "m", ".lora_E": "d",
    ".lora_diag": "d", ".lora_B.bias": "b",
}  # fmt: skip
TOKENS = (".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")


def plain(name: str) -> str:
    """A tensor's name without what PEFT and others wrap models in."""
    target = DEFAULT.sub("", WRAPPERS.sub("", name))
    while target.startswith(PREFIX):
        target = target.removeprefix(PREFIX)
    return target
