"""Adapters that lack what their config promises: PEFT's own list of missing keys is the oracle."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import dora_convert
from dora_convert.errors import DoraConvertError

from .toy import edit_json, make_adapter, make_base

PREFIX = "base_model.model."
FILE = "adapter_model.safetensors"
SIZES = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4}
PARTS = re.compile(r"\.(base_layer\.)?(lora_\w+|token_adapter|modules_to_save)\b.*")


def tiny(layers: int = 4, kind: str = "LlamaForCausalLM", *, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    if "GPT2" in kind:
        return cls(cls.config_class(vocab_size=70, n_layer=layers, n_embd=24, n_head=2, n_positions=16))
    fields = {"num_key_value_heads": 2, "tie_word_embeddings": tied}
    return cls(cls.config_class(**SIZES, num_hidden_layers=layers, **fields))


def train(
    tmp_path, config, *, kind: str = "LlamaForCausalLM", opened: str = "", tied: bool = False
) -> tuple[Path, Path]:
    """A base, and an adapter as PEFT saves it, with values."""
    tiny(kind=kind, tied=tied).save_pretrained(tmp_path / "base")
    cls = getattr(transformers, opened or kind)
    model = get_peft_model(cls.from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.01 if "magnitude" in name else 0.1))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def drop(adapter: Path, pattern: str) -> None:
    """Take the tensors whose names match out of an adapter."""
    tensors = load_file(adapter / FILE)
    left = {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}
    assert 0 < len(left) < len(tensors)
    save_file(left, adapter / FILE, {"format": "pt"})


def missed(base: Path, adapter: Path, opened: str = "LlamaForCausalLM") -> set[str]:
    """The modules that PEFT misses when it loads the adapter."""
    model = getattr(transformers, opened).from_pretrained(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(model, adapter)
    found = [str(each.message) for each in caught if "missing adapter keys" in str(each.message)]
    keys = re.findall(rf"'{re.escape(PREFIX)}([^']+)'", found[0]) if found else []
    return {PARTS.sub("", key) for key in keys}


def said(report: Any) -> set[str]:
    """The modules that a report's ledger has as missing; its warnings name them, too."""
    entries = [entry for entry in report.ledger if entry["fate"] == "missing"]
    modules = {PARTS.sub("", entry["tensor"].removeprefix(PREFIX)).removesuffix(".weight") for entry in entries}
    text = "\n".join(report.warnings)
    assert bool(modules) == bool(re.search(r"(?i)lacks|missing|not in", text)), text
    assert all(module in text for module in sorted(modules)[:3])
    assert all(entry["why"] and not entry["into"] for entry in entries)
    return modules


def lora(**config: Any) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=6, **{"target_modules": ["k_proj", "up_proj"], **config})


CASES = {  # config, and what is deleted
    "a layer": (lora(), r"layers\.2\."),
    "a layer of DoRA": (lora(use_dora=True), r"layers\.2\."),
    "the last two layers": (lora(), r"layers\.[23]\."),
    "a kind of module": (lora(), "up_proj"),
    "one module": (lora(), r"layers\.1\.mlp\.up_proj"),
    "a regex": (lora(target_modules=r".*\.(k_proj|up_proj)"), r"layers\.0\.mlp"),
    "some layers only": (lora(layers_to_transform=[0, 2]), r"layers\.2\."),
    "one layer as a number": (lora(layers_to_transform=1), r"layers\.1\.mlp"),
    "layers by pattern": (lora(layers_to_transform=[1, 3], layers_pattern="layers"), r"layers\.3\."),
    "without some": (lora(exclude_modules=["layers.0.mlp.up_proj"]), r"layers\.1\."),
    "without a regex": (lora(exclude_modules=r".*layers\.0\..*"), r"layers\.1\."),
    "full names": (lora(target_modules=["model.layers.0.mlp.up_proj", "v_proj"]), r"layers\.0\.mlp"),
    "all linear": (lora(target_modules="all-linear"), r"layers\.3\.self_attn\.o_proj"),
    "an embedding": (lora(target_modules=["embed_tokens", "k_proj"]), "lora_embedding"),
    "a head": (lora(target_modules=["lm_head", "k_proj"]), r"lm_head\.lora"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_is_named(tmp_path, case):
    """The modules that PEFT misses are in the warning and the ledger; before anything is deleted, there are none."""
    config, pattern = CASES[case]
    base, adapter = train(tmp_path, config)
    assert missed(base, adapter) == set()
    assert said(dora_convert.merge(base, adapter, tmp_path / "whole")) == set()
    drop(adapter, pattern)
    want = missed(base, adapter)
    assert want
    assert said(dora_convert.merge(base, adapter, tmp_path / "out")) == want
    assert said(dora_convert.merge(base, adapter, tmp_path / "dry", dry_run=True)) == want


def test_an_adapter_of_a_smaller_model(tmp_path):
    """Two layers' adapter on a base of four: it does not say how many it was trained on, but what it lacks."""
    base, adapter = train(tmp_path, lora())
    drop(adapter, r"layers\.[23]\.")
    report = dora_convert.merge(base, adapter, tmp_path / "out")
    assert said(report) == missed(base, adapter)
    assert len(said(report)) == 4
    assert any("4 modules" in text and "layers.2" in text and "layers.3" in text for text in report.warnings)


def test_strict_makes_it_an_error(tmp_path, run):
    """Exit code 2 with the names, and nothing written; a whole adapter passes."""
    base, adapter = train(tmp_path, lora())
    assert run("merge", base, adapter, tmp_path / "whole", "--strict", "-q")[0] == 0
    drop(adapter, r"layers\.2\.")
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base, adapter, tmp_path / "out", strict=True)
    assert all(module in caught.value.text() for module in missed(base, adapter))
    code, _, err = run("merge", base, adapter, tmp_path / "out", "--strict", "-q")
    assert code == 2
    assert "layers.2.mlp.up_proj" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run("merge", base, adapter, tmp_path / "out")
    assert (code, "layers.2.mlp.up_proj" in err) == (0, True)


def test_verify_does_not_pass_it_over(tmp_path):
    """The tensors are what base and adapter make; that the adapter is not whole is said, and an error with strict."""
    base, adapter = train(tmp_path, lora())
    drop(adapter, r"layers\.2\.")
    dora_convert.merge(base, adapter, tmp_path / "out")
    report = dora_convert.verify(base, adapter, tmp_path / "out")
    assert report.verdict == "agree"
    assert said(report) == missed(base, adapter)
    with pytest.raises(DoraConvertError, match=r"strict|missing|lacks"):
        dora_convert.verify(base, adapter, tmp_path / "out", strict=True)


def test_inspect_says_it_of_a_base(tmp_path):
    """With a base, what would be missing is among the landing's warnings."""
    base, adapter = train(tmp_path, lora())
    assert not dora_convert.inspect(adapter, base).landing.warnings
    drop(adapter, r"layers\.2\.")
    landing = dora_convert.inspect(adapter, base).landing
    assert landing.fits
    assert any("layers.2.mlp.up_proj" in text for text in landing.warnings)


def test_saved_modules_and_rows_that_are_promised(tmp_path):
    """modules_to_save and trainable_token_indices promise tensors, too. PEFT cannot load such a file at all."""
    base, adapter = train(tmp_path, lora(modules_to_save=["lm_head"]))
    drop(adapter, "lm_head")
    assert said(dora_convert.merge(base, adapter, tmp_path / "out")) == {"lm_head"}
    (tmp_path / "rows").mkdir()
    base, adapter = train(tmp_path / "rows", lora(trainable_token_indices=[3, 9]))
    drop(adapter, "trainable_tokens")
    assert said(dora_convert.merge(base, adapter, tmp_path / "rows/out")) == {"model.embed_tokens"}


@pytest.mark.parametrize("left", ["", "embed_tokens"])
def test_a_tied_head_that_is_promised(tmp_path, left):
    """The head is a module of the running model, though a tied base has no tensor of its name."""
    base, adapter = train(tmp_path, lora(modules_to_save=["lm_head", *filter(None, [left])]), tied=True)
    assert said(dora_convert.merge(base, adapter, tmp_path / "whole")) == set()
    drop(adapter, "lm_head")
    want = set() if left else {"lm_head"}  # what trained the embedding trained the one weight of both
    assert said(dora_convert.merge(base, adapter, tmp_path / "out")) == want


def test_all_linear_as_a_word(tmp_path):
    """Configs written by hand keep `all-linear`: every linear layer but the head, and no embedding."""
    base, adapter = train(tmp_path, lora(target_modules="all-linear"))
    edit_json(adapter / "adapter_config.json", target_modules="all-linear")
    assert said(dora_convert.merge(base, adapter, tmp_path / "whole")) == set()
    drop(adapter, r"layers\.0\.self_attn\.o_proj")
    assert said(dora_convert.merge(base, adapter, tmp_path / "out")) == {"model.layers.0.self_attn.o_proj"}


def test_gpt2(tmp_path):
    """Conv1D, and a prefix that the files lack."""
    base, adapter = train(tmp_path, lora(target_modules=["c_attn", "mlp.c_proj"]), kind="GPT2LMHeadModel")
    assert said(dora_convert.merge(base, adapter, tmp_path / "whole")) == set()
    drop(adapter, r"h\.1\.mlp")
    want = missed(base, adapter, "GPT2LMHeadModel")
    assert said(dora_convert.merge(base, adapter, tmp_path / "out")) == want


def test_names_of_a_bare_model(tmp_path):
    """Trained on AutoModel, whose names have no `model.`: the base's other modules are none of the config's."""
    config = lora(target_modules=["layers.0.mlp.up_proj", "k_proj"])
    base, adapter = train(tmp_path, config, opened="LlamaModel")
    assert said(dora_convert.merge(base, adapter, tmp_path / "whole")) == set()
    drop(adapter, r"layers\.1\.")
    found = said(dora_convert.merge(base, adapter, tmp_path / "out"))
    assert {name.removeprefix("model.") for name in found} == {"layers.1.self_attn.k_proj"}


def test_pruned_modules_are_not_missing(tmp_path):
    """AdaLoRA saves tensors without rows for modules that it pruned away."""
    config = AdaLoraConfig(init_r=3, target_r=2, target_modules=["k_proj"], total_step=10, lora_alpha=6)
    base, adapter = train(tmp_path, config)
    tensors = load_file(adapter / FILE)
    for name, tensor in tensors.items():
        if "layers.1." in name:
            tensors[name] = tensor[:, :0] if "lora_B" in name else tensor[:0]
    save_file(tensors, adapter / FILE, {"format": "pt"})
    assert said(dora_convert.merge(base, adapter, tmp_path / "out")) == set()


def test_modules_left_out_by_name(tmp_path):
    """What --exclude leaves out is not missed."""
    base, adapter = train(tmp_path, lora())
    drop(adapter, r"layers\.2\.")
    assert said(dora_convert.merge(base, adapter, tmp_path / "out", exclude=["*.layers.2.*"])) == set()


def test_our_own_adapters_are_whole(tmp_path):
    """What from-lora, to-lora and extract write promises what it holds, modules left out by name included."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    dora_convert.merge(base.path, adapter, tmp_path / "tuned", include=["*layers.0.mlp*"])
    dora_convert.from_lora(base.path, adapter, tmp_path / "dora")
    dora_convert.to_lora(base.path, adapter, tmp_path / "lora", rank=2, exclude=["*layers.1*"])
    dora_convert.extract(base.path, tmp_path / "tuned", tmp_path / "extracted", rank=4)
    for name in ("dora", "lora", "extracted"):
        report = dora_convert.merge(base.path, tmp_path / name, tmp_path / f"out-{name}", strict=True)
        assert said(report) == set()
