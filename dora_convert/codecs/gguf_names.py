"""llama.cpp's names of weights, and the Hub's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3", "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}  # fmt: skip
STARCODER2 = {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
PHI3 = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
FURTHER: Mapping[str, Mapping[str, str]] = {
    "gemma2": GEMMA, "gemma3": GEMMA, "qwen2moe": QWEN_EXPERTS, "qwen3moe": QWEN_EXPERTS, "phi3": PHI3,
    "starcoder2": STARCODER2,
}  # fmt: skip
"""Names inside a layer that an architecture has otherwise."""
NORMS_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3"})
"""Architectures whose norms have one added in GGUF files."""
ROTARY = {".q_proj.": "attention.head_count", ".k_proj.": "attention.head_count_kv"}
"""Modules whose rows lie in Meta's order in files of llama, and the pair that counts their heads."""
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<own>\w+)\.(?P<last>weight|bias)(?:\[(?P<expert>\d+)\])?")


def hub_name(name: str, architecture: str, model_types: Collection[str]) -> str | None:
    """Return the Hub's name of a tensor; None if it has none that is known."""
    if not (match := _NAME.fullmatch(name)):
        return None
    if match["layer"] is None:
        own = OUTER.get(match["own"])
        return own and f"{own}.{match['last']}"
    further = MIXTRAL if "mixtral" in model_types else FURTHER.get(architecture, {})
    own = further.get(match["own"], LAYER.get(match["own"]))
    if own is None or ("{}" in own) != (match["expert"] is not None):
        return None
    return f"model.layers.{match['layer']}.{own.format(match['expert'])}.{match['last']}"
