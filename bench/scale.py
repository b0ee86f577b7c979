"""Plan merges of the largest models from sparse files, and simulate the merges on clusters.

    python bench/scale.py plan FOLDER [--model deepseek-v3] [--targets attention|all]
    python bench/scale.py simulate [--model deepseek-v3] [--task 32] [--driver 1.0] …

`plan` writes headers with the real shapes and no bytes behind them, and runs `merge --dry-run` in a process of its own.
`simulate` deals tasks to hosts as they have time. All its assumptions are options, which it prints.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RANK, PIECE = 16, 64 << 20
Shapes = dict[str, tuple[int, ...]]


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


@dataclass(frozen=True)
class Storage:
    """GB/s of one host and of all hosts together, reading and writing, and seconds until the first byte."""

    host_read: float
    host_write: float
    all_read: float
    all_write: float
    wait: float


STORAGES = {
    "NFS": Storage(1.1, 1.1, 5.0, 3.0, 0.002),
    "NVMe": Storage(5.0, 2.5, math.inf, math.inf, 0.0002),
    "object store": Storage(2.5, 2.5, math.inf, math.inf, 0.05),
}
"""One NFS server on 10 GbE clients; a parallel file system over the hosts' own NVMe; S3 through 25 GbE."""


def tasks_of(model: Model, slots: int, chosen: argparse.Namespace) -> list[float]:
    """Return the bytes of each task: tensors in the order of files, grouped as dora_convert/cluster does.

    Tensors that no adapter touches are copied in pieces of 64 MiB.
    """
    sizes: list[float] = []
    for name, shape in model.tensors().items():
        nbytes, most = 2.0 * math.prod(shape), PIECE if "embed" in name or "head" in name else math.inf
        sizes += [min(most, nbytes - done) for done in range(0, int(nbytes), int(min(most, nbytes)))]
    groups, size, left = [], 0.0, sum(sizes)
    for nbytes in sizes:
        if size and size + nbytes > max(chosen.task * 2**20, left / (chosen.rounds * slots)):
            groups.append(size)
            size, left = 0.0, left - size
        size += nbytes
    return [*groups, size]


def simulate(model: Model, storage: Storage, hosts: int, chosen: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of planning and starting, of writing, and the rate that bounds the writing."""
    workers = hosts * chosen.cores
    rates = {
        "read": min(storage.host_read / chosen.cores, storage.all_read / workers),
        "write": min(storage.host_write / chosen.cores, storage.all_write / workers),
        "compute": chosen.compute,
    }
    slowest = min(rates, key=rates.__getitem__)
    free = [0.0] * workers
    driver = end = 0.0
    for nbytes in tasks_of(model, workers, chosen):
        driver += chosen.driver / 1000  # the driver submits, takes and enters each task
        seconds = nbytes / 1e9 / rates[slowest] * (1 - chosen.overlap)
        seconds += nbytes / 1e9 * sum(1 / rate for rate in rates.values()) * chosen.overlap if chosen.overlap else 0
        stop = max(heapq.heappop(free), driver) + seconds + storage.wait
        heapq.heappush(free, stop)
        end = max(end, stop)
    serial = chosen.plan + chosen.start + chosen.publish
    bound = "driver" if driver > 0.95 * end else slowest
    return {"serial": serial, "writing": end, "bound": bound}  # type: ignore[dict-item]


def table(chosen: argparse.Namespace) -> None:
    """Print times and speed-ups for 1, 8 and 64 hosts."""
    for name in ("cores", "compute", "task", "rounds", "driver", "plan", "start", "publish", "overlap"):
        print(f"--{name} {getattr(chosen, name):g}", end="  ")
    print()
    model = MODELS[chosen.model]
    total = 2 * sum(map(math.prod, model.tensors().values()))
    for name, storage in STORAGES.items():
        print(f"{name}: {storage}")
        one = simulate(model, storage, 1, chosen)
        for hosts in (1, 8, 64):
            found = simulate(model, storage, hosts, chosen)
            writing = one["writing"] / found["writing"]
            whole = (one["writing"] + one["serial"]) / (found["writing"] + found["serial"])
            hours = (found["writing"] + found["serial"]) / 3600
            print(f"  {hosts:2} hosts: {hours:6.3f} h, {total / hosts / 1e9:6.1f} GB a host each way", end="")
            print(f", bound by {found['bound']}; writing {writing:.1f} ×, whole {whole:.1f} ×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    planning, simulating = commands.add_parser("plan"), commands.add_parser("simulate")
    planning.add_argument("folder", type=Path)
    planning.add_argument("--targets", choices=("attention", "all"), default="attention")
    for each in (planning, simulating):
        each.add_argument("--model", choices=sorted(MODELS), default="deepseek-v3")
    for name, default, text in (
        ("cores", 16, "tasks that a host does at once"),
        ("compute", 0.4, "GB/s that one core merges, checks and hashes, without waiting for the disk"),
        ("task", 32, "least MiB of one task"),
        ("rounds", 2.0, "a task takes at most this part of the work left for each slot"),
        ("driver", 1.0, "milliseconds of the driver for each task"),
        ("plan", 7, "seconds to plan"),
        ("start", 8, "seconds until the nodes' processes have torch and the plan"),
        ("publish", 2, "seconds to write the receipt and to rename"),
        ("overlap", 0.0, "share of a task in which reading, computing and writing do not overlap"),
    ):
        simulating.add_argument(f"--{name}", type=type(default), default=default, help=text)
    chosen = parser.parse_args()
    plan(chosen) if chosen.command == "plan" else table(chosen)


if __name__ == "__main__":
    main()
