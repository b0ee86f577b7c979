"""Give small configs for families whose default config makes no small model, and their classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2,
}  # fmt: skip
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_RESNET = {
    "model_type": "resnet", "embedding_size": 8, "layer_type": "basic", "out_features": ["stage4"], **_STAGES,
}  # fmt: skip
_DETR = {
    "use_timm_backbone": False, "backbone_config": _RESNET, "d_model": 32, "num_queries": 6, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}  # fmt: skip
_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_IDS = {"audio_token_id": 90, "image_token_id": 91, "video_token_id": 92}
_EYE = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32}
_EAR = {
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_model": 32, "num_mel_bins": 16,
    "max_source_positions": 30, "output_dim": 32,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_OMNI = {
    "text_config": {**_TEXT, "head_dim": 8, "rope_parameters": _ROPE}, "vision_config": _EYE, "audio_config": _EAR,
    **_IDS,
}  # fmt: skip
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_BART = {
    "model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 99,
    "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "BeitForImageClassification": {**_VIT, "use_relative_position_bias": True},
    "ConditionalDetrForObjectDetection": _DETR,
    "ConvNextForImageClassification": _STAGES,
    "ConvNextV2ForImageClassification": _STAGES,
    "DbrxForCausalLM": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 99,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "DetrForObjectDetection": _DETR,
    "Dinov2ForImageClassification": _VIT,
    "Dinov2WithRegistersForImageClassification": _VIT,
    "DINOv3ViTModel": _VIT,
    "FalconH1ForCausalLM": {
        **_TEXT, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16,
    },
    "Gemma3nForConditionalGeneration": {  # needs timm; any of its networks will do
        "text_config": {
            **_TEXT, "head_dim": 8, "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2, "laurel_rank": 4,
        },
        "vision_config": {
            "architecture": "resnet10t", "hidden_size": 32, "vocab_size": 9, "vocab_offset": 80, "model_args": {},
        },
        "audio_config": {
            "hidden_size": 32, "conf_num_attention_heads": 4, "conf_num_hidden_layers": 2,
            "sscp_conv_channel_size": (8, 4), "vocab_size": 9, "vocab_offset": 90, "input_feat_size": 16,
        },
    },
    "Florence2ForConditionalGeneration": {
        "text_config": _BART,
        "vision_config": {
            "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
            "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4],
            "window_size": 4, "projection_dim": 32,
        },
        "image_token_id": 90,
    },
    "Qwen2_5OmniForConditionalGeneration": {"enable_audio_output": False, "thinker_config": _OMNI},
    "Qwen3OmniMoeForConditionalGeneration": {
        "enable_audio_output": False,
        "thinker_config": {
            **_OMNI,
            "text_config": {**_OMNI["text_config"], **_EXPERTS},
            "vision_config": {**_EYE, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            "audio_config": {**_EAR, "downsample_hidden_size": 16},
        },
    },
    "DonutSwinForImageClassification": _SWIN,
    "ResNetForImageClassification": {"embedding_size": 8, **_STAGES},
    "Swinv2ForImageClassification": _SWIN,
    "TableTransformerForObjectDetection": _DETR,
    "VitDetModel": {**_VIT, "window_block_indices": [0], "window_size": 2},
}  # fmt: skip
"""The fields of a config, by class."""
CLASSES = {
    "conditional_detr": "ConditionalDetrForObjectDetection",
    "detr": "DetrForObjectDetection",
    "table-transformer": "TableTransformerForObjectDetection",
}
"""The class of a family that people fine-tune, where it is not the one of `families.LISTS`."""
