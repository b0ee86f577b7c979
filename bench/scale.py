"""Plan merges of the largest models from sparse files, and simulate the merges on clusters.

    python bench/scale.py plan FOLDER [--model deepseek-v3] [--targets attention|all]
    python bench/scale.py simulate [--model deepseek-v3] [--task 32] [--driver 1.0] [--shard 0.5] …

`plan` writes headers with the real shapes and no bytes behind them, and runs `merge --dry-run` in a process of its own.
`simulate` deals tasks to hosts as they have time. All its assumptions are options, which it prints.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simulation import ASSUMED, Shapes, table

RANK = 16


@dataclass(frozen=True)
class Model:
    """A mixture of experts with multi-head latent attention, as DeepSeek-V3's config describes it."""

    layers: int
    dense: int
    experts: int
    heads: int
    vocabulary: int
    shards: int
    hidden: int = 7168
    inner: int = 18432
    expert: int = 2048

    def attention(self) -> Shapes:
        """Shapes of one layer's attention (q_lora_rank 1536, kv_lora_rank 512, heads of 128 + 64 and 128)."""
        return {
            "q_a_proj": (1536, self.hidden),
            "q_b_proj": (self.heads * 192, 1536),
            "kv_a_proj_with_mqa": (576, self.hidden),
            "kv_b_proj": (self.heads * 256, 512),
            "o_proj": (self.hidden, self.heads * 128),
        }

    def layer(self, number: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the tensors of one layer."""
        yield from ((f"self_attn.{name}.weight", shape) for name, shape in self.attention().items())
        yield from {"self_attn.q_a_layernorm.weight": (1536,), "self_attn.kv_a_layernorm.weight": (512,)}.items()
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield name, (self.hidden,)
        if number < self.dense:
            yield from self.block("mlp", self.inner)
            return
        yield "mlp.gate.weight", (self.experts, self.hidden)
        yield "mlp.gate.e_score_correction_bias", (self.experts,)
        yield from self.block("mlp.shared_experts", self.expert)
        for expert in range(self.experts):
            yield from self.block(f"mlp.experts.{expert}", self.expert)

    def block(self, prefix: str, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the three weights of a gated block."""
        for name, shape in (
            ("gate", (inner, self.hidden)),
            ("up", (inner, self.hidden)),
            ("down", (self.hidden, inner)),
        ):
            yield f"{prefix}.{name}_proj.weight", shape

    def tensors(self) -> Shapes:
        """Return all tensors, in the order of the files."""
        found: Shapes = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for number in range(self.layers):
            found |= {f"model.layers.{number}.{name}": shape for name, shape in self.layer(number)}
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}


MODELS = {
    "deepseek-v3": Model(layers=61, dense=3, experts=256, heads=128, vocabulary=129280, shards=163),
    "kimi-k2": Model(layers=61, dense=1, experts=384, heads=64, vocabulary=163840, shards=250),
}
"""671 B parameters in 45,395 tensors, and 1.03 T in 69,975; in bfloat16."""


def write_sparse(path: Path, shapes: Shapes, dtype: str, width: int) -> None:
    """Write a safetensors file with a header and a hole."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    data = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    data += b" " * (-len(data) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + position)


def write_base(folder: Path, model: Model) -> None:
    """Write a sparse checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, table = model.tensors(), {}
    share, groups, filled = sum(map(math.prod, tensors.values())) / model.shards, [{}], 0
    for name, shape in tensors.items():
        if filled >= share and len(groups) < model.shards:
            groups, filled = [*groups, {}], 0
        groups[-1][name] = shape
        filled += math.prod(shape)
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):06d}.safetensors"
        write_sparse(folder / file, group, "BF16", 2)
        table |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16"}
    config |= {"num_hidden_layers": model.layers, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, model: Model, targets: str) -> None:
    """Write a sparse LoRA on attention, or on all linear layers."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes: Shapes = {}
    for name, shape in model.tensors().items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") and not module.endswith("_with_mqa"):
            continue
        if targets == "all" or ".self_attn." in name:
            shapes[f"base_model.model.{module}.lora_A.weight"] = (RANK, shape[1])
            shapes[f"base_model.model.{module}.lora_B.weight"] = (shape[0], RANK)
    write_sparse(folder / "adapter_model.safetensors", shapes, "F32", 4)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": "all-linear", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))


DRY_RUN = """
import resource, sys, time
import dora_convert
begun = time.perf_counter()
report = dora_convert.merge(*sys.argv[1:4], dry_run=True).to_dict()
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(report["plan"]["tensors"], report["plan"]["bytes_out"], round(seconds, 2), peak)
"""


def plan(chosen: argparse.Namespace) -> None:
    """Time the plan of a merge."""
    model, folder = MODELS[chosen.model], chosen.folder
    write_base(folder / "base", model)
    write_adapter(folder / "adapter", model, chosen.targets)
    words = [sys.executable, "-c", DRY_RUN, folder / "base", folder / "adapter", folder / "out"]
    done = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
    tensors, nbytes, seconds, peak = done.stdout.split()[-4:]
    print(
        f"{chosen.model}, LoRA on {chosen.targets}: {int(tensors):,} tensors, {int(nbytes) / 1e12:.2f} TB; plan "
        f"{seconds} s, {float(seconds) / int(tensors) * 1e6:.0f} µs a tensor; peak {int(peak) / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    planning, simulating = commands.add_parser("plan"), commands.add_parser("simulate")
    planning.add_argument("folder", type=Path)
    planning.add_argument("--targets", choices=("attention", "all"), default="attention")
    for each in (planning, simulating):
        each.add_argument("--model", choices=sorted(MODELS), default="deepseek-v3")
    for name, (default, text) in ASSUMED.items():
        simulating.add_argument(f"--{name}", type=type(default), default=default, help=text)
    chosen = parser.parse_args()
    plan(chosen) if chosen.command == "plan" else table(MODELS[chosen.model].tensors(), chosen)


if __name__ == "__main__":
    main()
