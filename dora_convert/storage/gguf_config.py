"""Make a model's config.json, as transformers reads it, from the pairs of its GGUF files.

llama.cpp's names of the fields and the meaning of each are those of its convert_hf_to_gguf.py. What a file does not
say, and llama.cpp has in its code, is written here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import MalformedError, UnsupportedError
from .gguf_file import BlockTensor
from .safetensors import CONFIG_DTYPES, StoredTensor

Tensors = Mapping[str, StoredTensor]
Factors = Mapping[str, Sequence[float]]

CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"), "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"), "qwen2moe": ("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"), "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"), "phi3": ("phi3", "Phi3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"), "starcoder2": ("starcoder2", "Starcoder2ForCausalLM"),
}  # fmt: skip
"""llama.cpp's architectures that are read, with the model_type and the class in transformers."""
NUMBERS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.layer_norm_epsilon": "norm_epsilon",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}  # fmt: skip
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
EPSILON = {"starcoder2": "norm_epsilon"}
"""Fields of norms, where they are not of kind RMS."""
TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad"}
LARGE = {"gemma2": 46, "gemma3": 62}
"""Layers of the models of 27B, which divide the queries by another number than the size of a head."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The fields of Llama 3.1, 3.2 and 3.3 for rotary embeddings, beside the factor."""


def make_config(name: str, pairs: Mapping[str, Any], tensors: Tensors, factors: Factors) -> dict[str, Any]:
    """Return the config; raise UnsupportedError for architectures that are not read."""
    architecture = str(pairs.get("general.architecture"))
    if architecture not in CLASSES:
        known = ", ".join(CLASSES)
        raise UnsupportedError(f"{name} is a GGUF file of {architecture}; as a base these are read: {known}.")
    own = {key.removeprefix(f"{architecture}."): value for key, value in pairs.items()}
    config: dict[str, Any] = {
        field: _short(own[key]) for key, field in NUMBERS.items() if isinstance(own.get(key), int | float)
    }
    needed = (*NEEDED, EPSILON.get(architecture, "rms_norm_eps"))
    if missing := [field for field in needed if field not in config]:
        raise MalformedError(f"{name} does not say {', '.join(missing)}.", hint="put the model's config.json beside it")
    model_type, model_class = _class(architecture, own)
    embedding, tokens = tensors.get("token_embd.weight"), own.get("tokenizer.ggml.tokens") or ()
    config |= {
        "architectures": [model_class],
        "model_type": model_type,
        "vocab_size": len(tokens) if embedding is None else embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": CONFIG_DTYPES.get(_dtype(tensors), "bfloat16"),
    }
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("rope_theta", 10000.0)
    config |= {f"{short}_token_id": own.get(f"tokenizer.ggml.{name}_token_id") for name, short in TOKENS.items()}
    if scaling := _scaling(name, own, factors, config):
        config["rope_scaling"] = scaling
    return {**config, **_further(architecture, model_type, own, tensors, config)}


def _short(value: Any) -> Any:
    """Return a number with the digits that float32 has: 1e-05 instead of 9.999999747378752e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _class(architecture: str, own: Mapping[str, Any]) -> tuple[str, str]:
    """Return the model_type and class; llama.cpp calls Mistral and Mixtral llama, too."""
    if architecture == "llama":
        if own.get("expert_count"):
            return "mixtral", "MixtralForCausalLM"
        said = " ".join(str(own.get(f"general.{key}", "")) for key in ("name", "basename")).lower()
        if "mistral" in said or "ministral" in said:
            return "mistral", "MistralForCausalLM"
    return CLASSES[architecture]


def _dtype(tensors: Tensors) -> str:
    """Return the dtype of most elements; that of blocks counts as U8."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts["U8" if isinstance(tensor, BlockTensor) else tensor.dtype] += tensor.numel
    return counts.most_common(1)[0][0] if counts else ""


def _further(
    architecture: str, model_type: str, own: Mapping[str, Any], tensors: Tensors, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields that only some architectures have."""
    window = own.get("attention.sliding_window")
    match architecture:
        case "llama":
            biases = {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
            experts = {"num_local_experts": own["expert_count"]} if model_type == "mixtral" else {}
            return biases if model_type == "llama" else {"sliding_window": window, **experts}
        case "gemma2" | "gemma3":
            size = config["head_dim"]
            if config["num_hidden_layers"] == LARGE[architecture]:
                size = config["hidden_size"] // config["num_attention_heads"]
            return {"sliding_window": window, "query_pre_attn_scalar": size}
        case "qwen2moe" | "qwen3moe":
            return {"num_experts": own.get("expert_count"), "norm_topk_prob": architecture == "qwen3moe"}
        case "phi3":
            rotary = own.get("rope.dimension_count", config["head_dim"])
            first = own.get("rope.scaling.original_context_length", config.get("max_position_embeddings"))
            share = {"partial_rotary_factor": rotary / config["head_dim"]} if rotary != config["head_dim"] else {}
            return {"sliding_window": window or None, "original_max_position_embeddings": first, **share}
    return {}


def _scaling(name: str, own: Mapping[str, Any], factors: Factors, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the config says of scaled rotary embeddings."""
    if found := factors.get("rope_freqs.weight"):
        return _llama3(name, found, config)
    if long := factors.get("rope_factors_long.weight"):
        short = factors["rope_factors_short.weight"]
        return {"rope_type": "longrope", "long_factor": [*map(_short, long)], "short_factor": [*map(_short, short)]}
    kind, factor = own.get("rope.scaling.type"), _short(own.get("rope.scaling.factor", 1.0))
    if kind not in ("linear", "yarn"):
        return None
    first = own.get("rope.scaling.original_context_length")
    return {"rope_type": kind, "factor": factor} | ({"original_max_position_embeddings": first} if first else {})


def _llama3(name: str, found: Sequence[float], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return Llama 3.1's scaling, if its formula gives the factors of a file; UnsupportedError otherwise.

    A wavelength above 8192 / low is divided by the factor, one below 8192 / high is kept; between them, both mix.
    """
    factor = max(found)
    if factor == min(found) == 1:
        return None
    low, high, context = LLAMA3.values()
    size = 2 * len(found)
    for k, given in enumerate(found):
        wavelength = 2 * math.pi * config["rope_theta"] ** (2 * k / size)
        smooth = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        if abs(given * ((1 - smooth) / factor + smooth) - 1) > 1e-3:
            raise UnsupportedError(
                f"{name} scales its rotary embeddings by a rule that is not known.",
                hint="put the model's config.json into a folder with the GGUF file, and name the folder",
            )
    return {"rope_type": "llama3", "factor": round(factor, 3), **LLAMA3}
