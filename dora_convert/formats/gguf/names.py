"""Names of weights in llama.cpp, by architecture: as its convert_lora_to_gguf.py gives them.

Architectures are those of which a LoRA's factors keep their values there, but for the order of rows of q and k.
`tests/oracles/gguf_lora.py` compares every one with that program.
"""

from __future__ import annotations

from collections.abc import Mapping

MODULES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""The Hub's names inside a layer, and llama.cpp's."""
_GATE_UP = {"mlp.gate_up_proj": "ffn_up"}
OTHERS: Mapping[str, Mapping[str, str]] = {
    "phi3": {"self_attn.qkv_proj": "attn_qkv", **_GATE_UP},
    "glm4": _GATE_UP,
    "chatglm": _GATE_UP,
    "phi2": {"self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
    "starcoder2": {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    "qwen2moe": {
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        "mlp.gate": "ffn_gate_inp",
    },
}  # fmt: skip
"""Names that only one architecture has; they count before those of all."""
OUTSIDE = {"lm_head": "output", "model.embed_tokens": "token_embd"}
"""Names outside of layers."""
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
    "phi": "phi2", "phi3": "phi3", "starcoder2": "starcoder2", "stablelm": "stablelm", "olmo": "olmo",
    "olmo2": "olmo2", "granite": "granite", "cohere": "command-r", "cohere2": "cohere2", "smollm3": "smollm3",
    "glm": "chatglm", "glm4": "glm4", "nemotron": "nemotron", "exaone4": "exaone4", "olmo3": "olmo2",
    "seed_oss": "seed_oss", "ernie4_5": "ernie4_5", "hunyuan_v1_dense": "hunyuan-dense", "arcee": "arcee",
}  # fmt: skip
"""The model_type of the Hub's configs, and llama.cpp's architecture."""
PERMUTED = frozenset({"llama", "olmo", "granite", "smollm3", "arcee"})
"""Architectures whose q and k lie in Meta's order."""
ROTARY = (".q_proj", ".k_proj")


def modules_of(architecture: str) -> Mapping[str, str]:
    """Return the Hub's names inside a layer, and llama.cpp's, for one architecture; its own ones come last."""
    return {**MODULES, **OTHERS.get(architecture, {})}
