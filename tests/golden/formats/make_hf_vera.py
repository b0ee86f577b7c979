"""Make VeRA and DVoRA by AdapterHub's own library, as cases for make.py: `make_hf_vera.py CASES [HEADLESS]`.

Needs adapters 1.3.0 and its transformers. Each case is a tiny BERT classifier whose adapted layers are not square.
All trained matrices are random, vera_D and vera_B too. The truth is each layer's own forward in float64: its response
to unit inputs, and to zero for the bias. HEADLESS is a folder for an adapter that the library saves without A and B.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import adapters
import torch
from adapters import LoRAConfig
from adapters.context import ForwardContext
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

SIZES = {
    "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "num_labels": 3,
}  # fmt: skip
CASES = {
    "hfadapters-vera": {"r": 3, "alpha": 6, "intermediate_lora": True},
    "hfadapters-dvora": {"r": 4, "alpha": 10, "output_lora": True, "use_dora": True},
}


def randomise(model: torch.nn.Module) -> None:
    """Give every parameter of a new adapter random values; magnitudes stay near their norms."""
    for name, parameter in model.named_parameters():
        if ".m.weight" in name:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
        elif ".loras." in name or "shared_parameters" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)


def make_case(folder: Path, options: dict[str, object]) -> None:
    """Write the base, the adapter and the truth of one case."""
    torch.manual_seed(1)
    model = BertForSequenceClassification(BertConfig(**SIZES))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder / "base")
    adapters.init(model)
    config = LoRAConfig(selfattn_lora=False, vera_d=0.1, vera_b=0.0, init_weights="vera", **options)
    model.add_adapter("pirate", config=config, set_active=True)
    randomise(model)
    model.save_adapter(str(folder / "adapter"), "pirate", with_head=False, use_safetensors="use_dora" in options)
    model.double().eval()
    truth = {}
    for name, layer in model.named_modules():
        if "pirate" in getattr(layer, "loras", {}):
            truth |= responses(model, name, layer)
    save_file(truth, folder / "truth.safetensors")
    about = {"source": f"adapters {adapters.__version__} {options}", "options": []}
    (folder / "meta.json").write_text(json.dumps(about))


@torch.no_grad()
def responses(model: torch.nn.Module, name: str, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weight and the bias of one layer by its own forward; the bias only if the adapter changes it."""
    with ForwardContext(model, torch.zeros(1, 1, dtype=torch.long)) as context:
        context.shared_parameters = dict(model.base_model.shared_parameters.items())
        inputs = torch.eye(layer.in_features, dtype=torch.float64)
        zero = layer(torch.zeros(1, 1, layer.in_features, dtype=torch.float64))[0]
        weight = (layer(inputs[None])[0] - zero).T.contiguous()
    found = {f"{name}.weight": weight}
    if not torch.equal(zero[0], layer.bias):
        found[f"{name}.bias"] = zero[0].clone()
    return found


def without_a_head(folder: Path) -> None:
    """Show that the library's file of a model without a head has no shared matrices."""
    model = BertModel(BertConfig(**SIZES))
    adapters.init(model)
    model.add_adapter("pirate", config=LoRAConfig(vera_d=0.1, vera_b=0.0, init_weights="vera"))
    model.save_adapter(str(folder), "pirate")
    saved = torch.load(folder / "pytorch_adapter.bin")
    assert not any("shared_parameters" in name for name in saved), "the library has been repaired"


if __name__ == "__main__":
    for case, its_options in CASES.items():
        make_case(Path(sys.argv[1]) / case, its_options)
    if len(sys.argv) > 2:
        without_a_head(Path(sys.argv[2]))
