"""Make a tiny model of any family that transformers has, with random weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from .. import make_families
from . import explicit

SIZES: Mapping[str, Any] = {
    r"hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim|embedding_size|projection_dim|output_dim|"
    r"word_embed_proj_dim|d_embed|emb_dim|text_hidden_size|out_hidden_size|vision_embed_dim|vision_output_dim|"
    r"mm_hidden_size|projector_hidden_size|text_embed_dim|encoder_hidden_size|model_dim|width|embed_size": 32,
    r"(.*_)?(intermediate_size|ffn_dim|n_inner|d_ff|ff_dim|ffn_hidden_size|feed_forward_size|mlp_dim|"
    r"intermediate_dim|ffn_intermediate_size|ffn_size)": 48,
    r"(.*_)?moe_intermediate_size|expert_ffn_size|expert_ffn_hidden_size|expert_intermediate_size": 24,
    r"(.*_)?(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_encoder_layers|"
    r"num_decoder_layers|depth|n_blocks|num_blocks)": 2,
    r"(.*_)?(num_attention_heads|n_heads?|num_heads|encoder_attention_heads|decoder_attention_heads|"
    r"attention_heads)": 4,
    r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num)": 2,
    r"(attention_)?head_dim|head_size|d_kv|qk_head_dim|kv_channels|v_head_dim|qk_nope_head_dim|"
    r"global_head_dim|swa_head_dim": 8,
    r"qk_rope_head_dim|rotary_dim|qk_rope_dim": 4,
    r"kv_lora_rank": 12,
    r"q_lora_rank": 16,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts": 12,
    r"num_experts_per_tok(ken)?|moe_topk|moe_k|top_k_experts|moe_top_k|num_selected_experts": 2,
    r"n_group|topk_group|n_groups_moe": 1,
    r"(text_)?vocab_size|padded_vocab_size": 99,
    r"image_size|img_size|sample_size": 16,
    r"patch_size|spatial_patch_size": 4,
    r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|seq_length": 64,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|first_dense_layers|n_dense_layers": 1,
}
"""Values of config fields, by expressions for their names."""
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
_GEMMA = {
    "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "bamba": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gemma3n_text": _GEMMA,
    "gemma4_text": _GEMMA,
    "gemma4_unified_text": _GEMMA,
    "diffusion_gemma_text": _GEMMA,
    "mobilebert": {"embedding_size": 16},
    "xlnet": {"d_head": 8},
}
"""Fields whose sizes depend on others, by model type."""
MADE_OF_OTHERS = ("gemma4_text", "gemma4_unified_text", "diffusion_gemma_text")
"""Model types whose `per_layer_config` is made of the other fields."""
MOST_PARAMETERS = 80_000_000


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """Return a config with small sizes; lists of one entry a layer are cut."""
    layers = getattr(config, "num_hidden_layers", None)
    for key, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            setattr(config, key, shrunk(value))
        elif isinstance(value, list) and len(value) == layers and layers > 2:
            setattr(config, key, [value[0], value[-1]])
        elif isinstance(value, int) and not isinstance(value, bool) and not key.startswith("_"):
            setattr(config, key, _small(key, value))
    for key, value in OTHERS.get(config.model_type, {}).items():
        if hasattr(config, key):
            setattr(config, key, value)
    if config.model_type in MADE_OF_OTHERS:
        fields = config.to_dict()
        fields.pop("per_layer_config", None)
        return type(config)(**fields)
    return config


def _small(key: str, value: int) -> int:
    """Return a small number for a config field."""
    small = next((size for names, size in SIZES.items() if re.fullmatch(names, key)), None)
    if small is not None:
        return min(small, value)
    return 90 + value % 9 if re.search("token_id|token_index", key) and value >= 99 else value


def tiny(name: str) -> PreTrainedModel | str:
    """Return a tiny model of a class, in float32 with random weights; the reason if its config makes none."""
    try:
        cls = getattr(transformers, name)
        fields = explicit.CONFIGS.get(name)
        config = cls.config_class(**fields) if fields else shrunk(make_families.hinted(cls.config_class()))
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in cls(config).parameters())
        if count > MOST_PARAMETERS:
            return f"is not tiny: {count} parameters"
        torch.manual_seed(1)
        model = cls(config).float().eval()
    except Exception as error:  # noqa: BLE001 # any of 400 families' own
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point and parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    return model
