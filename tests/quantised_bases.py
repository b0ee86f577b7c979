"""The golden quantised bases, adapters for them, and float64 oracles."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dora_convert.codecs.detect import find_coded
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.reader import read_whole
from dora_convert.storage.refs import local_source

GOLDEN = Path(__file__).parent / "golden/quantised"
TRUTH = json.loads((GOLDEN / "truth.json").read_text())
RANK, ALPHA = 4, 6
LLAMA = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")
"""The modules that the test adapters change: not square, and one of a group that servers fuse."""


class WholeParts:
    """Reads parts at once, the simplest way."""

    def rows(self, part, start, stop):
        return self._all(part)[start:stop]

    def columns(self, part, start, stop):
        return self._all(part)[:, start:stop]

    def _all(self, part):
        return torch.frombuffer(bytearray(read_whole(part)), dtype=torch.uint8).view(part.shape)


def decoded(tensor, start, stop):
    """Return rows of a coded tensor's matrix in float64."""
    out = torch.empty(stop - start, tensor.columns, dtype=torch.float64)
    tensor.scheme.fill(tensor, WholeParts(), start, out)
    return out


def opened(path):
    return open_checkpoint(local_source(Path(path)))


def dense_values(path) -> dict[str, torch.Tensor]:
    """Return the float64 values of every weight of a checkpoint, coded or not."""
    base = opened(path)
    coded = find_coded(base)
    parts = {part.name for tensor in coded.values() for part in tensor.parts.values()}
    values = {}
    for name, tensor in coded.items():
        rows = tensor.numel // tensor.columns
        values[name] = decoded(tensor, 0, rows).reshape(tensor.shape)
    for shard in base.shards:
        loaded = load_file(base.root / shard.filename)
        values |= {name: loaded[name].double() for name in loaded if name not in parts}
    return values


def copy_base(kind, path):
    shutil.copytree(GOLDEN / kind, path)
    (path / "README.md").write_text("# a quantised base\n")
    return path


def make_adapter(path, base, *, dora, modules=LLAMA, size=0.02):
    """Write a PEFT adapter on some modules, with perturbed magnitudes if it is a DoRA."""
    generator = torch.Generator().manual_seed(7)
    values, tensors = dense_values(base), {}
    for module in modules:
        out, inn = values[f"{module}.weight"].shape
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inn, generator=generator) * size * 5
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * size * 5
        if dora:
            norms = values[f"{module}.weight"].norm(dim=1)
            tensors[f"{key}.lora_magnitude_vector"] = (
                norms * (1 + 0.1 * torch.randn(out, generator=generator))
            ).float()
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": dora, "bias": "none", "use_rslora": False,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}), "fan_in_fan_out": False,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def merged_values(base, adapter, modules=LLAMA):
    """Return the merge's float64 result, by definition."""
    values, tensors = dense_values(base), load_file(adapter / "adapter_model.safetensors")
    for module in modules:
        key = f"base_model.model.{module}"
        A, B = (tensors[f"{key}.lora_{side}.weight"].double() for side in "AB")
        V = values[f"{module}.weight"] + ALPHA / RANK * B @ A
        if (m := tensors.get(f"{key}.lora_magnitude_vector")) is not None:
            V = V * (m.double() / V.norm(dim=1))[:, None]
        values[f"{module}.weight"] = V
    return values


def rounded(x, dtype):
    """Return float64 values rounded to the nearest of a dtype, ties to even, by the definition."""
    if dtype in (torch.float32, torch.float64):
        return x.to(dtype)
    bits, least = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}[dtype]
    exponent = torch.floor(torch.log2(x.abs().clamp(min=math.ldexp(1, least)))).clamp(min=least)
    unit = torch.pow(torch.tensor(2.0, dtype=torch.float64), exponent - bits + 1)
    return (torch.round(x / unit) * unit).to(dtype)
