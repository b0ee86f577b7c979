"""Names of torchtune's files and modules, and the families whose rows it keeps in Meta's order."""

from __future__ import annotations

OWN = "adapter_model.pt"
MODULES = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}  # fmt: skip
"""torchtune's names inside a layer, and those of the Hub."""
ROTARY = (".q_proj", ".k_proj")
META = frozenset({"llama", "mistral", "gemma", "gemma2", "mixtral"})
"""Families whose q and k torchtune reorders as Meta did."""
PLAIN = frozenset({"qwen2", "qwen3", "phi3"})
"""Families whose rows torchtune leaves in order."""
