"""Toy checkpoints and adapters, never square and never at initialisation, and float64 oracles for them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dora_convert.output.shards import ShardFiles

HIDDEN, WIDE, VOCABULARY = 40, 96, 72
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (24, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
TARGETS = ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
RANK, ALPHA = 4, 6


@dataclass
class Base:
    """A checkpoint folder and its tensors."""

    path: Path
    tensors: dict[str, torch.Tensor]


def make_base(path: Path, dtype: torch.dtype = torch.bfloat16, *, shards: int = 2, layers: int = 2) -> Base:
    """Write a checkpoint of Llama's names, with the side files that a real one has."""
    torch.manual_seed(1)
    path.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN),
        "lm_head.weight": torch.randn(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.randn(HIDDEN),
    }
    for layer in range(layers):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape) * 0.1
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.randn(HIDDEN)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_shards(path, tensors, shards)
    write_json(path / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "tie_word_embeddings": False, "torch_dtype": str(dtype).removeprefix("torch."),
    })  # fmt: skip
    write_json(path / "tokenizer_config.json", {"model_max_length": 128})
    (path / "README.md").write_text("# the base\n")
    (path / "modeling_toy.py").write_text("# code\n")
    return Base(path, tensors)


def write_shards(path: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """One file, or several and an index."""
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return
    names, table = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number::shards]
        save_file({name: tensors[name] for name in mine}, path / file, {"format": "pt"})
        table |= dict.fromkeys(mine, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": table})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2))


def make_adapter(
    path: Path, base: Base, *, dora: bool, targets=TARGETS, rank: int = RANK, seed: int = 2, extra=None, **config
) -> Path:
    """Write a PEFT adapter for a base of `make_base`; `extra` holds further tensors, `config` further fields."""
    torch.manual_seed(seed)
    path.mkdir()
    tensors = {}
    for name, weight in base.tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith(tuple(targets)):
            continue
        out, inputs = weight.shape
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs) / math.sqrt(inputs)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank) * 0.05
        if dora:
            norm = weight.float().norm(dim=1)
            tensors[f"{prefix}.lora_magnitude_vector"] = norm * (1 + 0.2 * torch.randn(out))
    save_file(tensors | (extra or {}), path / "adapter_model.safetensors", {"format": "pt"})
    write_json(path / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.path.name, "r": rank,
        "lora_alpha": ALPHA, "use_dora": dora, "bias": "none", "target_modules": list(targets), **config,
    })  # fmt: skip
    return path


def embeddings_and_head() -> dict[str, torch.Tensor]:
    """Further tensors for `make_adapter`: a DoRA of the embeddings, and a saved head."""
    prefix = "base_model.model.model.embed_tokens"
    return {
        f"{prefix}.lora_embedding_A": torch.randn(4, 72),
        f"{prefix}.lora_embedding_B": torch.randn(40, 4),
        f"{prefix}.lora_magnitude_vector": torch.rand(40) + 8,
        "base_model.model.lm_head.weight": torch.randn(72, 40),
    }


def edit_json(path: Path, **fields) -> None:
    """Change some fields of a JSON file."""
    write_json(path, json.loads(path.read_text()) | fields)


def low_rank(adapter: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """BA of a module in float64."""
    prefix = f"base_model.model.{module}"
    return adapter[f"{prefix}.lora_B.weight"].double() @ adapter[f"{prefix}.lora_A.weight"].double()


def exact(base: Base, adapter_path: Path, *, scale: float = ALPHA / RANK) -> dict[str, torch.Tensor]:
    """Every weight of the merged model in float64, by the definition of LoRA and DoRA."""
    adapter = load_file(adapter_path / "adapter_model.safetensors")
    merged = {name: tensor.double() for name, tensor in base.tensors.items()}
    for name, weight in merged.items():
        module = name.removesuffix(".weight")
        prefix = f"base_model.model.{module}"
        if f"{prefix}.lora_A.weight" in adapter:
            V = weight + scale * low_rank(adapter, module)
            m = adapter.get(f"{prefix}.lora_magnitude_vector")
            merged[name] = V if m is None else V * (m.double() / V.norm(dim=1))[:, None]
    return merged


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to the nearest value of a dtype, ties to even: neighbours are found by bits and compared in float64."""
    if dtype in (torch.float64, torch.float32):
        return x.to(dtype)
    near = x.to(dtype)
    bits = near.view(torch.int16)
    candidates = [(bits + step).view(dtype) for step in (-1, 0, 1)]
    distances = torch.stack([(c.double() - x).abs().nan_to_num(float("inf")) for c in candidates])
    even = torch.stack([c.view(torch.int16) % 2 == 0 for c in candidates])
    least = distances.min(dim=0).values
    rank = torch.where(distances == least, torch.where(even, 0, 1), 2)
    spec = rank.argmin(dim=0)
    return torch.stack(candidates).gather(0, spec[None])[0]


def load(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, as the safetensors library reads it."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return load_file(path / "model.safetensors")
    table = json.loads(index.read_text())["weight_map"]
    found = {}
    for file in sorted(set(table.values())):
        found |= load_file(path / file)
    assert found.keys() == table.keys()
    return found


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@contextmanager
def stopped(writes: int = 3) -> Iterator[None]:
    """Ctrl-C for what writes tensors within, once so many blocks are written; that of one worker, to be the same each time."""
    write, seen = ShardFiles.write, []

    def stops(self: ShardFiles, *arguments: object) -> None:
        if len(seen) == writes:
            raise KeyboardInterrupt
        seen.append(self)
        write(self, *arguments)

    ShardFiles.write = stops
    try:
        yield
    except KeyboardInterrupt:
        return
    finally:
        ShardFiles.write = write
    raise AssertionError("nothing was stopped")
