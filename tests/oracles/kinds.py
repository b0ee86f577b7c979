"""Merge adapters of every kind that PEFT has besides LoRA, and compare with PEFT's own merged weights in float64.

Bases are tiny and not square: a Llama, a GPT-2 (whose weights are stored as (in, out)), and convolutions. All
parameters are moved off their beginnings. Run as a script: each case prints its relative error, and the script
fails if one is above 1e-6, if verify disagrees, or if an exact unmerge does not restore every byte.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

import dora_convert

MOST = 1e-6
LINEAR = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "loha": ("llama", lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LINEAR, rank_pattern={"v_proj": 2})),
    "loha-conv": ("conv", lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["a", "b", "c", "d"])),
    "loha-conv-core": (
        "conv",
        lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["a", "b", "d"], use_effective_conv2d=True),
    ),
    "lokr": ("llama", lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=LINEAR, decompose_factor=4)),
    "lokr-both": (
        "llama",
        lambda: peft.LoKrConfig(r=1, alpha=5, target_modules=LINEAR, decompose_both=True, decompose_factor=4),
    ),
    "lokr-full": ("llama", lambda: peft.LoKrConfig(r=64, alpha=5, target_modules=LINEAR, decompose_factor=2)),
    "lokr-conv": ("conv", lambda: peft.LoKrConfig(r=1, alpha=5, target_modules=["a", "b", "c", "d"])),
    "lokr-conv-core": (
        "conv",
        lambda: peft.LoKrConfig(r=1, alpha=5, target_modules=["a", "b", "d"], use_effective_conv2d=True),
    ),
    "loha-head": ("llama", lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LINEAR, modules_to_save=["lm_head"])),
    "oft-biases": ("qwen2", lambda: peft.OFTConfig(oft_block_size=4, target_modules=LINEAR, bias="oft_only")),
    "hra-all-biases": ("qwen2", lambda: peft.HRAConfig(r=2, target_modules=LINEAR, bias="all")),
    "oft-embedding": ("llama", lambda: peft.OFTConfig(oft_block_size=4, target_modules=["embed_tokens", "q_proj"])),
    "hira": ("llama", lambda: peft.HiraConfig(r=4, target_modules=LINEAR)),
    "vera": ("llama", lambda: peft.VeraConfig(r=4, target_modules=LINEAR)),
    "vera-seed": (
        "llama",
        lambda: peft.VeraConfig(r=4, target_modules=LINEAR, save_projection=False, projection_prng_key=7),
    ),
    "vera-gpt2": ("gpt2", lambda: peft.VeraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "oft": ("llama", lambda: peft.OFTConfig(oft_block_size=4, target_modules=LINEAR)),
    "oft-exact": ("llama", lambda: peft.OFTConfig(oft_block_size=8, target_modules=LINEAR, use_cayley_neumann=False)),
    "oft-constrained": ("llama", lambda: peft.OFTConfig(oft_block_size=4, target_modules=LINEAR, coft=True, eps=0.1)),
    "oft-shared": ("llama", lambda: peft.OFTConfig(oft_block_size=4, target_modules=LINEAR, block_share=True)),
    "oft-conv": ("conv", lambda: peft.OFTConfig(oft_block_size=2, target_modules=["a", "d"])),
    "boft": ("llama", lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=LINEAR)),
    "boft-conv": ("conv", lambda: peft.BOFTConfig(boft_block_size=2, target_modules=["a", "d"])),
    "hra": ("llama", lambda: peft.HRAConfig(r=4, target_modules=LINEAR)),
    "hra-gs": ("llama", lambda: peft.HRAConfig(r=4, target_modules=LINEAR, apply_GS=True)),
    "hra-conv": ("conv", lambda: peft.HRAConfig(r=4, target_modules=["a", "d"])),
    "ia3": (
        "qwen2",
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "ia3-gpt2": ("gpt2", lambda: peft.IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"])),
    "ia3-conv": ("conv", lambda: peft.IA3Config(target_modules=["a", "b", "d"], feedforward_modules=["b"])),
    "shira": ("llama", lambda: peft.ShiraConfig(r=2, target_modules=LINEAR)),
    "miss": ("llama", lambda: peft.MissConfig(r=7, target_modules=LINEAR)),
    "miss-mini": ("llama", lambda: peft.MissConfig(r=4, mini_r=4, target_modules=LINEAR, init_weights="mini")),
    "delora": ("llama", lambda: peft.DeloraConfig(r=4, target_modules=LINEAR)),
    "fourierft": ("llama", lambda: peft.FourierFTConfig(n_frequency=40, scaling=20.0, target_modules=LINEAR)),
    "fourierft-gpt2": ("gpt2", lambda: peft.FourierFTConfig(n_frequency=40, target_modules=["c_attn", "c_proj"])),
    "c3a": ("llama", lambda: peft.C3AConfig(block_size=8, target_modules=LINEAR)),
    "randlora": ("llama", lambda: peft.RandLoraConfig(r=6, randlora_alpha=12, target_modules=LINEAR)),
}


class Convolutions(nn.Module):
    """Convolutions of several kernels, and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 10, 3), nn.Conv2d(10, 8, 1)
        self.c, self.d = nn.Conv1d(8, 6, 3), nn.Linear(6, 4)


def make_model(kind: str) -> nn.Module:
    """Return a tiny model whose weights are random."""
    torch.manual_seed(1)
    if kind == "conv":
        return Convolutions()
    if kind == "gpt2":
        config: Any = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50, n_positions=16, n_inner=40)
    else:
        form = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind]
        config = form(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
            num_key_value_heads=2, vocab_size=50, tie_word_embeddings=False,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def save_base(model: nn.Module, folder: Path) -> None:
    """Save a base in float32."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        folder.mkdir(parents=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text('{"model_type": "convolutions"}')


def make_case(kind: str, make_config: Callable[[], Any], folder: Path) -> dict[str, torch.Tensor]:
    """Write base and adapter, and return PEFT's merged weights in float64, by the base's names."""
    base = make_model(kind)
    save_base(base, folder / "base")
    wrapped = peft.get_peft_model(base, make_config())
    torch.manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter)
            parameter.data = noise * (0.05 if ".oft_" in name else 0.3) + ("ia3" in name or "boft_s" in name)
    wrapped.save_pretrained(folder / "adapter")
    plain = make_model(kind)
    loaded = peft.PeftModel.from_pretrained(plain, folder / "adapter", autocast_adapter_dtype=False).double()
    return dict(loaded.merge_and_unload().state_dict())


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def check(name: str, folder: Path) -> Iterator[str]:
    """Yield what is wrong with one case."""
    truth = make_case(*CASES[name], folder)
    base, adapter, out, back = (folder / part for part in ("base", "adapter", "out", "back"))
    dora_convert.merge(base, adapter, out, undo="exact")
    before, got = read(base), read(out)
    changed = {key for key in before if not torch.equal(before[key], got[key])}
    error = max(float((got[key] - truth[key]).norm() / truth[key].norm()) for key in before)
    moved = min(float((got[key] - before[key]).norm() / before[key].norm()) for key in changed) if changed else 0.0
    sys.stdout.write(f"{name:20} {len(changed):3} tensors, error {error:.1e}, moved by {moved:.1e}\n")
    if error > MOST or moved < 1e-4:
        yield f"{name}: error {error:.1e}, moved {moved:.1e}"
    report = dora_convert.verify(base, adapter, out).to_dict()
    if report["verdict"] != "agree":
        yield f"{name}: verify says {report['verdict']}"
    dora_convert.unmerge(out, adapter, back)
    if any(not torch.equal(tensor, before[key]) for key, tensor in read(back).items()):
        yield f"{name}: not restored"
    dora_convert.merge(base, adapter, folder / "norms")
    dora_convert.unmerge(folder / "norms", adapter, folder / "again")
    again = read(folder / "again")
    worst = max(float((again[key] - before[key]).norm() / before[key].norm()) for key in before)
    if worst > 1e-5:
        yield f"{name}: by its norms alone restored to {worst:.1e} only"


def main(names: list[str]) -> int:
    """Check the named cases, or all."""
    faults = []
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                faults += check(name, Path(folder))
            except Exception as error:  # noqa: BLE001 - the report names every case
                faults.append(f"{name}: {type(error).__name__}: {error}"[:400])
    sys.stdout.write("\n".join([*faults, f"{len(faults)} faults", ""]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
