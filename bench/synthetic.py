"""Write synthetic checkpoints and adapters of a real model's shapes, without transformers.

    python synthetic.py FOLDER [--layers 16 | --size 1.24 | --experts 4500] [--shards 5] [--rank 16]

FOLDER/base is a Llama in bf16, by default of 1.24 B parameters. Below 1 B, it has few words. With `--experts`, it is
a model of so many small weights of experts. FOLDER/dora and FOLDER/lora are PEFT adapters
on all linear layers. FOLDER/qv is an adapter on q_proj and v_proj. Magnitudes are the rows' norms, perturbed.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY, FEW_WORDS = 2048, 8192, 512, 128256, 8000
EXPERT, EXPERTS = (256, 768), 128
"""The shape of an expert's weight, and the experts of a layer."""
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
DEVIATION = 0.02


def shapes(layers: int, vocabulary: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model, in the order of the file."""
    if experts:
        found = {
            f"model.layers.{n // EXPERTS}.mlp.experts.{n % EXPERTS}.up_proj.weight": EXPERT for n in range(experts)
        }
        return {"model.embed_tokens.weight": (64, EXPERT[1]), **found}
    found = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{name}.weight": shape for name, shape in LINEAR.items()}
        found |= {f"{prefix}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (HIDDEN,)}


def write_base(folder: Path, todo: dict[str, tuple[int, ...]], shards: int) -> None:
    """Write the base in shards of about equal size."""
    folder.mkdir(parents=True, exist_ok=True)
    table: dict[str, str] = {}
    vocabulary, hidden = todo["model.embed_tokens.weight"]
    share = sum(math.prod(shape) for shape in todo.values()) / shards
    groups: list[list[str]] = [[]]
    filled = 0.0
    for name, shape in todo.items():
        if filled >= share and len(groups) < shards:
            groups.append([])
            filled = 0.0
        groups[-1].append(name)
        filled += math.prod(shape)
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        tensors = {name: torch.randn(todo[name]).mul_(DEVIATION).bfloat16() for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        table |= dict.fromkeys(names, file)
    total = 2 * sum(math.prod(shape) for shape in todo.values())
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM" if hidden == HIDDEN else "Qwen3MoeForCausalLM"],
        "model_type": "llama" if hidden == HIDDEN else "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": len({name.split(".")[2] for name in todo if ".layers." in name}),
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_adapter(folder: Path, todo: dict[str, tuple[int, ...]], rank: int, *, dora: bool) -> None:
    """Write a PEFT adapter on some linear layers, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, shape in todo.items():
        out, inputs = shape
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs) / math.sqrt(inputs)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank) * DEVIATION / 10
        if dora:
            norm = DEVIATION * math.sqrt(inputs)
            tensors[f"{prefix}.lora_magnitude_vector"] = norm * (1 + 0.05 * torch.randn(out))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_config(folder, rank, dora=dora)


def write_config(folder: Path, rank: int, *, dora: bool) -> None:
    """Return the content of adapter_config.json."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "use_dora": dora,
        "bias": "none",
        "target_modules": "all-linear",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--size", type=float, default=0.0, help="billions of parameters, instead of layers")
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    layers, vocabulary = chosen.layers, FEW_WORDS if 0 < chosen.size < 1 else VOCABULARY
    if chosen.size:
        layer = sum(map(math.prod, LINEAR.values()))
        layers = max(1, round((chosen.size * 1e9 - vocabulary * HIDDEN) / layer))
    todo = shapes(layers, vocabulary, chosen.experts)
    write_base(chosen.folder / "base", todo, chosen.shards)
    linear = {name: shape for name, shape in todo.items() if name.endswith("_proj.weight")}
    some = {name: shape for name, shape in linear.items() if chosen.experts or ".q_proj." in name or ".v_proj." in name}
    write_adapter(chosen.folder / "dora", linear, chosen.rank, dora=True)
    write_adapter(chosen.folder / "lora", linear, chosen.rank, dora=False)
    write_adapter(chosen.folder / "qv", some, chosen.rank, dora=False)


if __name__ == "__main__":
    main()
