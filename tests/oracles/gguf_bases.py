"""Compare GGUF bases with transformers' own loader: weights, config and tokenizer of every architecture that is read.

    python -m tests.oracles.gguf_bases [FILE.gguf]

Makes a tiny model of each architecture in transformers, writes it as llama.cpp's converter does with the gguf package,
and merges an adapter that changes nothing but one weight. The output must be the model itself, and compute its logits.
FILE is a real model: its dense weights must be those that transformers loads. Ends with an error for a difference.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import dora_convert
from tests.gguf_bases import in_metas_order

TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
GEMMAS = {"sliding_window": 16, "query_pre_attn_scalar": 32}
MODELS = {
    "llama": ("llama", {}), "qwen2": ("qwen2", {}), "qwen3": ("qwen3", {}), "gemma": ("gemma", {}), "gemma2": ("gemma2", GEMMAS), "gemma3": ("gemma3_text", GEMMAS), "phi3": ("phi3", {"head_dim": 16}),
    "starcoder2": ("starcoder2", {"head_dim": 16, "norm_epsilon": 1e-5}),
    "qwen2moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 80}),
    "qwen3moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
PARTS = (
    ("input_layernorm", "attn_norm"), ("self_attn.qkv_proj", "attn_qkv"), ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"), ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("mlp.gate", "ffn_gate_inp"),
    ("block_sparse_moe.gate", "ffn_gate_inp"), ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
    ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"), ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    ("mlp.shared_expert.down_proj", "ffn_down_shexp"), ("mlp.c_fc", "ffn_up"), ("mlp.c_proj", "ffn_down"),
)  # fmt: skip
"""The Hub's names inside a layer, and llama.cpp's, as its converter's table has them."""
GEMMA = {
    "pre_feedforward_layernorm": "ffn_norm", "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def gguf_tensors(state: dict[str, torch.Tensor], name: str, config: object) -> dict[str, np.ndarray]:
    """Return a checkpoint's tensors as llama.cpp's converter writes them."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {"post_attention_layernorm": "ffn_norm", **dict(PARTS)}
    inner |= GEMMA if name in ("gemma2", "gemma3") else {}
    tensors: dict[str, np.ndarray] = {}
    experts: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    short = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
    for key, tensor in state.items():
        value, (module, _, last) = tensor.float().numpy(), key.rpartition(".")
        if name.startswith("gemma") and module.endswith("norm"):
            value = value + 1
        if module in outer:
            tensors[f"{outer[module]}.{last}"] = value
            continue
        layer, _, rest = module.removeprefix("model.layers.").partition(".")
        if ".experts." in rest:
            number, own = rest.split(".experts.")[1].split(".")
            experts.setdefault((layer, short[own]), {})[int(number)] = value
            continue
        if name in ("llama", "mixtral") and rest in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in rest else config.num_key_value_heads  # type: ignore[attr-defined]
            value = in_metas_order(value, heads)
        value = value[0] if rest == "mlp.shared_expert_gate" else value
        tensors[f"blk.{layer}.{inner[rest]}.{last}"] = value
    for (layer, own), each in experts.items():
        tensors[f"blk.{layer}.ffn_{own}_exps.weight"] = np.stack([each[k] for k in sorted(each)])
    return tensors


def write(path: Path, name: str, config: object, tensors: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, "llama" if name == "mixtral" else name)
    of = vars(config)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    (writer.add_layer_norm_eps if name == "starcoder2" else writer.add_layer_norm_rms_eps)(1e-5)
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") or rope.get("full_attention", {}).get("rope_theta") or 10000.0
    writer.add_rope_freq_base(float(theta))
    if name not in ("phi3", "starcoder2"):
        writer.add_key_length(32)
    if window := of.get("sliding_window"):
        writer.add_sliding_window(window)
    if name in ("qwen2moe", "qwen3moe", "mixtral"):
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
    if name in ("qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(48)
    if name == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(80)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    for key, value in tensors.items():
        writer.add_tensor(key, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def adapter(path: Path, state: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """Write a LoRA of one projection; return the weight's name and the change."""
    name = next(key for key in state if key.endswith(("o_proj.weight", "out_proj.weight")))
    out, inn = state[name].shape
    A, B = torch.randn(2, inn), torch.randn(out, 2)
    path.mkdir()
    module = f"base_model.model.{name.removesuffix('.weight')}"
    save_file({f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}, path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(said))
    return name, B.double() @ A.double()


def architecture(name: str, root: Path) -> None:
    kind, more = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**TINY, **more}, tie_word_embeddings=name.startswith("gemma"))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(root / "hub")
    state = load_file(root / "hub/model.safetensors")
    write(root / "model.gguf", name, config, gguf_tensors(state, name, config))
    touched, change = adapter(root / "adapter", state)
    dora_convert.merge(root / "model.gguf", root / "adapter", root / "out", dequantize=True, device="cpu")
    got = load_file(root / "out/model.safetensors")
    assert got.keys() == state.keys(), f"{name}: {got.keys() ^ state.keys()}"
    exact = 0 if not name.startswith("gemma") else 1e-6  # one is added in float32
    for key, value in state.items():
        wanted = value.double() + (change if key == touched else 0)
        off = (got[key].double() - wanted.float().double()).abs().max().item()
        assert off <= (1e-6 if key == touched else exact), f"{name}: {key} is off by {off}"
    loaded = AutoModelForCausalLM.from_pretrained(root / "out").float().eval()
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(root / "hub").state_dict())
    with torch.no_grad():
        target = dict(model.named_parameters())[touched]
        target.add_(change.float())
        ids = torch.arange(3, 35)[None]
        one, two = model(ids).logits, loaded(ids).logits
    off = ((one - two).norm() / one.norm()).item()
    assert off < 1e-4, f"{name}: logits differ by {off}"
    print(f"{name}: {len(got)} weights are the model's, logits differ by {off:.1e}")  # noqa: T201


def real(file: Path, root: Path) -> None:
    """Compare a real file with transformers' loader: weights in bfloat16, and the tokenizer."""
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    state = {name: value for name, value in theirs.items() if name != "lm_head.weight"}
    touched, _ = adapter(root / "adapter", state)
    dora_convert.merge(file, root / "adapter", root / "out", dequantize=True, device="cpu")
    got = load_file(root / "out/model.safetensors")
    off = {name: int((got[name] != state[name].bfloat16()).sum()) for name in state if name != touched}
    total = sum(state[name].numel() for name in off)
    assert sum(off.values()) <= total / 20_000, off
    ours, other = (
        AutoTokenizer.from_pretrained(root / "out"),
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
    )
    texts = ["Hello world, it's me", "  two\n\nlines\t", "日本語 🙂 naïve", "def f(x):\n    return x"]
    assert [ours(text).input_ids for text in texts] == [other(text).input_ids for text in texts]
    assert [ours.decode(ours(text).input_ids) for text in texts] == texts
    print(f"{file.name}: {sum(off.values())} of {total} elements differ from transformers'; the tokenizer is the same")  # noqa: T201


def sentencepiece() -> None:
    """Compare tokenizers of SentencePiece's kind with those that transformers makes of the same pairs."""
    from tokenizers import Tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    from dora_convert.storage.gguf_model import GgufModel
    from dora_convert.storage.gguf_tokenizer import make_tokenizer

    words = ["▁", *"helowrd,", "▁h", "▁he", "ll", "llo", "lo", "▁hello", "wo", "rld", "ld", "▁wo", "▁world", "  "]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{k:02X}>" for k in range(256)), *words]
    pairs = {
        "model": "llama", "tokens": tokens, "scores": [0.0] * 259 + [-float(k) for k in range(len(words))],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(words), "bos_token_id": 1, "eos_token_id": 2,
        "unknown_token_id": 0,
    }  # fmt: skip
    theirs = {"tokenizer_type": "llama", **{key: pairs[key] for key in ("tokens", "scores", "token_type")}}
    for name in ("llama", "gemma2"):
        said = {"general.architecture": name, **{f"tokenizer.ggml.{key}": value for key, value in pairs.items()}}
        own = Tokenizer.from_str(make_tokenizer(GgufModel("x", said))["tokenizer.json"].decode())
        other, _ = convert_gguf_tokenizer(name, theirs)
        for text in ("hello world", "hello, hello  world", "wor ld\nüber", "hell</s>"):
            ids, wanted = own.encode(text).ids, other.encode(text, add_special_tokens=False).ids
            assert ids == [1, *wanted], f"{name}: {text!r} is {ids}, not {wanted}"
            assert own.decode(ids) == other.decode(wanted), f"{name}: {own.decode(ids)!r}"
        print(f"{name}: the tokenizer of SentencePiece's kind is transformers'")  # noqa: T201


if __name__ == "__main__":
    disable_progress_bar()
    set_verbosity_error()
    sentencepiece()
    for each in MODELS:
        with tempfile.TemporaryDirectory() as where:
            architecture(each, Path(where))
    if sys.argv[1:]:
        with tempfile.TemporaryDirectory() as where:
            real(Path(sys.argv[1]), Path(where))
