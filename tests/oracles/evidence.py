"""Tell readings of magnitudes apart on real weights: rows or columns, Meta's order, normalised or not.

    python -m tests.oracles.evidence MODEL [TRIALS]

MODEL is a folder of a Llama with square q and o projections, such as SmolLM2-135M. Each trial takes one layer's
norms of W, moves each by its own random factor (2, 5, 10 or 20 percent, with a low-rank change of W beside it), and
writes an adapter of the kind that a tool would have written. A merge is planned; its decision must be the right
one. The script prints how many trials of each kind were told apart, and fails below 99 of 100.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import dora_convert
from dora_convert.adapters.rotary import meta_rows

RANK, LEAST = 8, 0.99
NOISE = (0.02, 0.05, 0.1, 0.2)
SQUARE = ("q_proj", "o_proj")


def one_layer(model: Path, layer: int, folder: Path) -> dict[str, Tensor]:
    """Write a base of one layer's q, k, v and o projections, and return them."""
    weights = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if f".layers.{layer}.self_attn." in name and name.endswith(".weight"):
                    weights[name.replace(f".{layer}.", ".0.")] = tensors.get_tensor(name).float()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def trained(W: Tensor, axis: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return B, A and magnitudes along an axis, as training might leave them."""
    A, B = torch.randn(RANK, W.shape[1]), torch.randn(W.shape[0], RANK)
    B *= noise * W.norm() / (B @ A).norm()
    V = W + B @ A
    return B, A, V.norm(dim=axis) * (1 + noise * torch.randn(V.shape[1 - axis]))


def kohya(weights: dict[str, Tensor], noise: float, axis: str, folder: Path) -> Path:
    """Write a LyCORIS file whose dora_scale is a vector on square weights."""
    tensors = {}
    for name, W in weights.items():
        if name.split(".")[-2] in SQUARE:
            key = "lycoris_" + name.removesuffix(".weight").replace(".", "_")
            B, A, m = trained(W, 1 if axis == "rows" else 0, noise)
            parts = {"lora_up.weight": B, "lora_down.weight": A, "dora_scale": m, "alpha": torch.tensor(float(RANK))}
            tensors |= {f"{key}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def peft(weights: dict[str, Tensor], noise: float, how: str, folder: Path, size: int) -> Path:
    """Write a PEFT DoRA: as it is, with magnitudes of q and k in Meta's order, or with normalised ones."""
    tensors = {}
    for name, W in weights.items():
        B, A, m = trained(W, 1, noise)
        if how == "normalised":
            m = m / (W + B @ A).norm(dim=1)
        if how == "meta" and name.split(".")[-2] in ("q_proj", "k_proj"):
            order = torch.tensor(meta_rows(len(m), size))
            m = torch.empty_like(m).index_copy_(0, order, m)
        key = "base_model.model." + name.removesuffix(".weight")
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B, f"{key}.lora_magnitude_vector": m}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "use_dora": True}
    config |= {"target_modules": sorted({name.split(".")[-2] for name in weights})}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def decided(base: Path, adapter: Path) -> str:
    """Return the reading that a planned merge decides on, or the error."""
    try:
        report = dora_convert.merge(base, adapter, base.parent / "out", dry_run=True)
    except dora_convert.DoraConvertError as error:
        return f"error: {error}"
    said = " ".join(report.warnings)
    signs = {"rows": "by rows", "columns": "by columns", "normalised": "divided by their norms", "meta": "Meta's order"}
    return next((kind for kind, sign in signs.items() if sign in said), "plain")


def main(model: Path, trials: int) -> int:
    """Run the trials of each kind, and print their counts."""
    config = json.loads((model / "config.json").read_text())
    size = config["hidden_size"] // config["num_attention_heads"]
    right: dict[str, int] = {}
    missed = []
    for trial in range(trials):
        torch.manual_seed(trial)
        noise = NOISE[trial % len(NOISE)]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            layer = trial * 7 % config["num_hidden_layers"]
            weights = one_layer(model, layer, folder / "base")
            for kind in ("rows", "columns"):
                found = decided(folder / "base", kohya(weights, noise, kind, folder))
                right[kind] = right.get(kind, 0) + (found == kind)
                missed += [f"{kind}, layer {layer}, noise {noise}: {found}"] if found != kind else []
            for kind in ("plain", "meta", "normalised"):
                found = decided(folder / "base", peft(weights, noise, kind, folder / kind, size))
                right[kind] = right.get(kind, 0) + (found == kind)
                missed += [f"{kind}, layer {layer}, noise {noise}: {found}"] if found != kind else []
    sys.stdout.write("".join(f"{kind:12} {count} of {trials}\n" for kind, count in right.items()))
    sys.stdout.write("".join(f"  {line[:200]}\n" for line in missed))
    return 0 if all(count >= LEAST * trials for count in right.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100))
