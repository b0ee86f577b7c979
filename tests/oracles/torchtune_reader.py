"""Load an adapter with torchtune, and write the weights that its layers apply, under Hugging Face's names.

    TOOLS/python tests/oracles/torchtune_reader.py BASE ADAPTER OUT.safetensors

A process of its own: torchtune 0.6 needs torchao 0.9, which PEFT does not load beside. So torchao lies in a folder
of its own in the environment, `TOOLS/../torchao`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(sys.prefix) / "torchao"))

import torch
from safetensors.torch import load_file, save_file
from torchtune.models.convert_weights import hf_to_tune, tune_to_hf
from torchtune.models.llama2 import lora_llama2

MODULES = ["q_proj", "k_proj", "v_proj", "output_proj"]


def applied(layer: torch.nn.Module) -> torch.Tensor:
    """Return the weight (out, in) that a layer applies, by its own forward."""
    x = torch.eye(layer.weight.shape[1], dtype=layer.weight.dtype)
    with torch.no_grad():
        return layer(x).T.contiguous()


def main(base: Path, adapter: Path, out: Path) -> None:
    """Load base and adapter as torchtune's recipes do, and save what the layers apply."""
    config, lora = (
        json.loads((path / name).read_text())
        for path, name in ((base, "config.json"), (adapter, "adapter_config.json"))
    )
    state = torch.load(adapter / "adapter_model.pt", weights_only=True)
    heads, kv, dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    model = lora_llama2(
        lora_attn_modules=MODULES, apply_lora_to_mlp=True, apply_lora_to_output=False, lora_rank=lora["r"],
        lora_alpha=lora["lora_alpha"], use_dora=any(name.endswith("magnitude") for name in state),
        vocab_size=config["vocab_size"], num_layers=config["num_hidden_layers"], num_heads=heads, num_kv_heads=kv,
        embed_dim=dim, intermediate_dim=config["intermediate_size"], max_seq_len=16,
    )  # fmt: skip
    own = hf_to_tune(load_file(base / "model.safetensors"), num_heads=heads, num_kv_heads=kv, dim=dim)
    _, unexpected = model.load_state_dict(own, strict=False)
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not unexpected + surplus, unexpected + surplus
    assert not [name for name in missing if "lora_" in name or "magnitude" in name], missing
    model.double()
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_a")}
    merged = own | {f"{name}.weight": applied(layer) for name, layer in layers.items()}
    save_file(
        {k: T.contiguous() for k, T in tune_to_hf(merged, num_heads=heads, num_kv_heads=kv, dim=dim).items()}, out
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
