"""Tiny models in GGUF files, written with the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES

HIDDEN, INNER, HEADS, KV, VOCAB = 256, 512, 4, 2, 40
SIZE = HIDDEN // HEADS
LAYER = {
    "attn_q": ("self_attn.q_proj", (HIDDEN, HIDDEN)), "attn_k": ("self_attn.k_proj", (KV * SIZE, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KV * SIZE, HIDDEN)), "attn_output": ("self_attn.o_proj", (HIDDEN, HIDDEN)),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN)), "ffn_up": ("mlp.up_proj", (INNER, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER)),
}  # fmt: skip
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HALVES = {  # bytes of a block that are float16: random bytes there would be Inf
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
    "MXFP4": (),
}  # fmt: skip


def random_blocks(kind: str, shape, chance) -> np.ndarray:
    """Return a matrix of a quantised type: any bytes, with scales of a usual size."""
    elements, nbytes = GGML_QUANT_SIZES[Kind[kind]]
    blocks = chance.integers(0, 256, (shape[0] * shape[1] // elements, nbytes), dtype=np.uint8)
    if kind == "TQ1_0":  # bytes that stand for five digits
        blocks[:, :52] = (chance.integers(0, 243, (len(blocks), 52)) * 256 + 242) // 243
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = chance.uniform(1e-3, 2e-3, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = chance.integers(115, 120, len(blocks))
    return blocks.reshape(shape[0], -1)


def in_metas_order(W, heads):
    """Return rows as llama.cpp's converter permutes them."""
    return W.reshape(heads, 2, W.shape[0] // heads // 2, *W.shape[1:]).swapaxes(1, 2).reshape(W.shape)


def back(W, heads):
    """Return rows in the Hub's order."""
    return W.reshape(heads, W.shape[0] // heads // 2, 2, *W.shape[1:]).swapaxes(1, 2).reshape(W.shape)


def pairs_of(writer, *, theta=10000.0):
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)
    writer.add_key_length(SIZE)


def write_file(path, architecture, tensors, *, pairs=pairs_of, split=0):
    """Write tensors, given as arrays or as (blocks, kind)."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_type("model")
    pairs(writer)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=Kind[value[1]])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(path, kind, seed=0, **options):
    """Write a llama whose matrices are of a kind; return the dense values by the Hub's names, as gguf decodes them."""
    chance, tensors, values = np.random.default_rng(seed), {}, {}

    def put(name, hub, shape):
        if kind in ("F32", "F16"):
            data = chance.normal(0, 0.05, shape).astype(np.float32 if kind == "F32" else np.float16)
            tensors[name], whole = data, data
        else:
            data = random_blocks(kind, shape, chance)
            tensors[name], whole = (data, kind), gguf.dequantize(data, Kind[kind])
        values[hub] = torch.from_numpy(np.ascontiguousarray(whole)).double()

    put("token_embd.weight", "model.embed_tokens.weight", (VOCAB, HIDDEN))
    put("output.weight", "lm_head.weight", (VOCAB, HIDDEN))
    for own, (hub, shape) in LAYER.items():
        put(f"blk.0.{own}.weight", f"model.layers.0.{hub}.weight", shape)
    for name, heads in (("q_proj", HEADS), ("k_proj", KV)):
        hub = f"model.layers.0.self_attn.{name}.weight"
        values[hub] = back(values[hub], heads).contiguous()
    for own, hub in {
        "output_norm": "model.norm",
        **{f"blk.0.{a}": f"model.layers.0.{b}" for a, b in NORMS.items()},
    }.items():
        data = chance.normal(1, 0.1, HIDDEN).astype(np.float32)
        tensors[f"{own}.weight"], values[f"{hub}.weight"] = data, torch.from_numpy(data).double()
    write_file(path, "llama", tensors, **options)
    return values
