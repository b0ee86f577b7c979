"""Count trained parameters as the DoRA paper's tables do: trained / (base + trained)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..adapters import Adapter, Decomposed, Full, LowRank, Update
from ..errors import UnsupportedError
from ..naming.resolve import is_embedding, is_head
from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import StoredTensor

LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo", "granite", "smollm3"})
"""Families whose layers are q, k, v, o, gate, up and down; norms count too little to differ."""


def share_of(base: Checkpoint, adapter: Adapter) -> float:
    """Return the share of trained parameters, from headers; tensors under two names count once."""
    trained = {
        (tensor.path, tensor.start): tensor.numel
        for change in adapter.changes
        if not (isinstance(change.update, Full) and change.update.copied)
        for tensor in _trained(change.update)
    }
    return _share(_count(base.tensors), sum(trained.values()))


def _trained(update: Update) -> Iterator[StoredTensor]:
    """Yield the tensors that training changed: VeRA's factors stay as they began, its diagonals do not."""
    if isinstance(update, Decomposed):
        yield update.m
        yield from _trained(update.inner) if update.inner else ()
    elif isinstance(update, LowRank) and update.b:
        yield from filter(None, (update.d, update.b))
    else:
        yield from update.tensors


def _count(tensors: Mapping[str, StoredTensor]) -> int:
    """Return the number of parameters, each once."""
    distinct = {(tensor.path, tensor.start): tensor.numel for tensor in tensors.values()}
    return sum(distinct.values())


def _share(base: int, trained: int) -> float:
    return trained / (base + trained) if trained else 0.0


def share_by_config(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> float:
    """Return the share of trained parameters from config.json and adapter_config.json alone.

    Raises UnsupportedError for models and adapters whose shapes the configs do not tell.
    """
    from ..formats.peft.config import Config, refuse_unsupported
    from ..formats.peft.modules import promised

    refuse_unsupported(adapter, "adapter", adapter)
    parsed = Config.parse(adapter, Path("adapter_config.json"))
    if parsed.adalora or parsed.bias != "none" or parsed.parameters:
        raise UnsupportedError("Ranks of AdaLoRA, biases and target_parameters are counted from headers only.")
    shapes = shapes_of(config)
    trained = 0
    for name in dict.fromkeys(promised(parsed, (), shapes, lambda name: not (is_embedding(name) or is_head(name)))):
        shape = shapes[name]
        if parsed.saves(name):
            trained += math.prod(shape)
            continue
        outputs = shape[1] if is_embedding(name) else shape[0]
        trained += parsed.rank(name.removesuffix(".weight")) * sum(shape) + parsed.use_dora * outputs
    return _share(sum(map(math.prod, shapes.values())), trained)


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the weights of a model by name, from its config.json alone.

    Raises UnsupportedError for families whose shapes are not known here.
    """
    kind = config.get("model_type")
    if kind not in LLAMA_LIKE:
        raise UnsupportedError(
            f"The shapes of {kind or 'a model without model_type'} are not known from its config.",
            hint="name a folder with weights: headers tell the shapes",
        )
    hidden, inner = _number(config, "hidden_size"), _number(config, "intermediate_size")
    heads = _number(config, "num_attention_heads")
    width = config.get("head_dim") or hidden // heads
    queries, keys = heads * width, (config.get("num_key_value_heads") or heads) * width
    biased = ("q_proj", "k_proj", "v_proj") if kind == "qwen2" or config.get("attention_bias") else ()
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_number(config, "vocab_size"), hidden)}
    for number in range(_number(config, "num_hidden_layers")):
        before = f"model.layers.{number}."
        shapes |= {f"{before}{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"{before}self_attn.{name}.bias": layer[f"self_attn.{name}"][:1] for name in biased}
        shapes |= {f"{before}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", kind in ("gemma", "gemma2")):
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


def _number(config: Mapping[str, Any], name: str) -> int:
    """Return a size of a config."""
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedError(f"config.json: {name} is {value!r}, which is not a size.")
    return value
