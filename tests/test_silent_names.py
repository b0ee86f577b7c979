"""Modules whose names are words of PEFT's own key layout: PEFT's merge of each is the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn

import dora_convert
from dora_convert.errors import DoraConvertError

FILE, PREFIX = "adapter_model.safetensors", "base_model.model."


def net(*names: str) -> nn.Module:
    """A model of linear layers of one shape under these names, so that no shape tells them apart."""
    torch.manual_seed(3)
    model = nn.Module()
    for name in names:
        *parents, leaf = name.split(".")
        owner = model
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            owner = owner._modules[parent]
        owner.add_module(leaf, nn.Linear(14, 22))
    return model


def merged(model: PeftModel, names) -> dict[str, torch.Tensor]:
    """The weights of each module after PEFT merged its layers; PEFT's own unloading stumbles over some names."""
    found = {}
    for name in names:
        module = model.base_model.model.get_submodule(name)
        if isinstance(module, LoraLayer):
            module.merge()
            module = module.get_base_layer()
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save["default"]
        found |= {f"{name}.{leaf}": tensor.detach().clone() for leaf, tensor in module.named_parameters()}
    return found


def train(tmp_path: Path, names, config: LoraConfig) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base and an adapter on disk, and PEFT's merge of what it loads again."""
    model = net(*names)
    (tmp_path / "base").mkdir(parents=True)
    save_file(model.state_dict(), tmp_path / "base/model.safetensors", {"format": "pt"})
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.05 if "magnitude" in name else 0.3))
    model.save_pretrained(tmp_path / "adapter")
    want = merged(model, names)
    again = merged(PeftModel.from_pretrained(net(*names), tmp_path / "adapter"), names)
    assert all(torch.equal(want[name], tensor) for name, tensor in again.items()), "PEFT loads another adapter"
    return tmp_path / "base", tmp_path / "adapter", want


def same(out: Path, want: dict[str, torch.Tensor]) -> None:
    got = load_file(out / "model.safetensors")
    assert got.keys() == want.keys()
    wrong = [name for name, x in want.items() if not torch.allclose(got[name], x, rtol=1e-5, atol=1e-6)]
    assert not wrong


WORDS = (
    "default", "module", "weight", "base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector",
    "modules_to_save", "modules_to_save.default", "original_module", "token_adapter", "trainable_tokens_delta", "bias",
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model.model", "base_model", "model", "decoder",
    "lora_A.default", "weight.lora_B",
)  # fmt: skip


def lora(target: str, **config) -> LoraConfig:
    """For the modules whose full names match, and no others."""
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": target, **config})


@pytest.mark.parametrize("where", ["inside", "outside", "both"])
@pytest.mark.parametrize("word", WORDS)
def test_a_parent_called_by_a_word_of_the_layout(tmp_path, word, where):
    """`fc` and `WORD.fc`, and the same two in a block: the one that was trained is changed, and no other."""
    names = ["fc", f"{word}.fc", "block.fc", f"block.{word}.fc"]
    dotted = word.replace(".", r"\.")
    target = {"inside": rf"(block\.)?{dotted}\.fc", "outside": r"(block\.)?fc", "both": r".*fc"}[where]
    base, adapter, want = train(tmp_path, names, lora(target))
    dora_convert.merge(base, adapter, tmp_path / "out")
    same(tmp_path / "out", want)
    assert dora_convert.verify(base, adapter, tmp_path / "out").verdict == "agree"


@pytest.mark.parametrize("word", [word for word in WORDS if "." not in word])
def test_a_layer_called_by_a_word_of_the_layout(tmp_path, word):
    """A linear layer that is itself called so, beside others."""
    names = ["fc", word, "block.fc", f"block.{word}", f"block.fc2.{word}"]
    base, adapter, want = train(tmp_path, names, lora(rf"(block\.)?{word}"))
    dora_convert.merge(base, adapter, tmp_path / "out")
    same(tmp_path / "out", want)


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True}], ids=str
)
@pytest.mark.parametrize("word", ["default", "module", "base_layer", "lora_A", "weight"])
def test_with_dora_and_biases(tmp_path, word, config):
    """Magnitudes and biases find the same module as the factors do."""
    base, adapter, want = train(tmp_path, ["fc", f"{word}.fc"], lora(rf"{word}\.fc", **config))
    dora_convert.merge(base, adapter, tmp_path / "out")
    same(tmp_path / "out", want)


@pytest.mark.parametrize("word", ["default", "module", "base_layer", "modules_to_save", "lora_B"])
def test_saved_whole(tmp_path, word):
    """modules_to_save names `WORD.head`; `head` stays."""
    names = ["fc", "head", f"{word}.head"]
    base, adapter, want = train(tmp_path, names, lora("fc", modules_to_save=[f"{word}.head"]))
    dora_convert.merge(base, adapter, tmp_path / "out")
    same(tmp_path / "out", want)


@pytest.mark.parametrize("word", ["default", "module", "weight", "_orig_mod"])
def test_patterns_match_the_whole_name(tmp_path, word):
    """rank_pattern and alpha_pattern are matched against the module's own name, words of the layout included."""
    patterns = {"rank_pattern": {f"^{word}.fc$": 5}, "alpha_pattern": {f"^{word}.fc$": 20}}
    base, adapter, want = train(tmp_path, ["fc", f"{word}.fc"], lora(r".*fc", **patterns))
    dora_convert.merge(base, adapter, tmp_path / "out")
    same(tmp_path / "out", want)


@pytest.mark.parametrize("word", ["default", "module", "base_layer"])
def test_adapters_made_of_it_keep_the_names(tmp_path, word):
    """to-lora and from-lora write what PEFT reads for the very same modules."""
    names = ["fc", f"{word}.fc"]
    base, adapter, want = train(tmp_path, names, lora(rf"{word}\.fc"))
    dora_convert.to_lora(base, adapter, tmp_path / "lora", rank=3)
    dora_convert.from_lora(base, adapter, tmp_path / "dora")
    for made in ("lora", "dora"):
        model = PeftModel.from_pretrained(net(*names), tmp_path / made)
        got = merged(model, names)
        assert all(torch.allclose(got[name], x, rtol=1e-4, atol=1e-5) for name, x in want.items())


RAW = {  # what other savers leave in names: only where PEFT itself puts it, and only where the plain name is nothing
    "the adapter's name": (".lora_A.weight", ".lora_A.default.weight"),
    "a wrapper inside": (f"{PREFIX}fc", f"{PREFIX}module.fc"),
    "torch.compile": (f"{PREFIX}fc", f"{PREFIX}_orig_mod.fc"),
    "a wrapper outside": ("base_model.", "module.base_model."),
    "FSDP": (f"{PREFIX}fc", f"{PREFIX}_fsdp_wrapped_module.fc"),
    "no prefix": (PREFIX, ""),
}


@pytest.mark.parametrize("case", RAW)
@pytest.mark.parametrize("other", [(), ("default.fc",), ("other.fc",)], ids=str)
def test_what_other_savers_leave_in_names_is_still_taken_out(tmp_path, case, other):
    """Where the base has no such name, `fc` is meant, whatever else it has."""
    before, after = RAW[case]
    base, adapter, want = train(tmp_path, ["fc", *other], lora("fc"))
    tensors = {name.replace(before, after): tensor for name, tensor in load_file(adapter / FILE).items()}
    save_file(tensors, adapter / FILE, {"format": "pt"})
    dora_convert.merge(base, adapter, tmp_path / "out")
    same(tmp_path / "out", want)


def test_a_name_with_two_readings_is_an_error(tmp_path):
    """`default.fc` trained in one adapter, and the same tensor under `fc` with the adapter's name left in: one of each."""
    base, adapter, _ = train(tmp_path, ["fc", "default.fc"], lora(r"default\.fc"))
    tensors = load_file(adapter / FILE)
    tensors |= {
        name.replace("default.fc.lora_B", "default.fc.lora_B.default"): x.clone() for name, x in tensors.items()
    }
    save_file(tensors, adapter / FILE, {"format": "pt"})
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base, adapter, tmp_path / "out")
    assert "lora_B.default" in caught.value.text()
