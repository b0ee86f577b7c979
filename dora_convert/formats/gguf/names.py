"""Names of weights in llama.cpp, for models of Llama's kind."""

from __future__ import annotations

MODULES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""The Hub's names inside a layer, and llama.cpp's."""
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}  # fmt: skip
"""The model_type of the Hub's configs, and llama.cpp's architecture."""
PERMUTED = frozenset({"llama"})
"""Architectures whose q and k lie in Meta's order."""
ROTARY = (".q_proj", ".k_proj")
