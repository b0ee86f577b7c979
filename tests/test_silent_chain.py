"""Adapters trained one after the other: PEFT's two merges are the oracle; merged at once they are a sum, and that is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import dora_convert
from dora_convert.errors import RefError, UsageError

from .toy import edit_json, load

CONFIG = "adapter_config.json"


def train(base: Path, out: Path, *, dora: bool, seed: int) -> Path:
    """An adapter that PEFT trained on a folder; its config names that folder."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base)
    targets = ["k_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, use_dora=dora, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 1 + 0.3 * torch.randn_like(parameter) if "magnitude" in name else 1
                parameter.mul_(scale).add_(torch.randn_like(parameter) * (0 if "magnitude" in name else 0.2))
    model.save_pretrained(out)
    return out


KINDS = [(True, True), (False, True), (True, False), (False, False)]


@pytest.fixture(params=KINDS, ids=["DoRA-DoRA", "LoRA-DoRA", "DoRA-LoRA", "LoRA-LoRA"])
def chain(request, tmp_path):
    """base, sft (trained on it), dpo (trained on their merge, by PEFT), and that chain's weights.

    Only a later DoRA makes a difference: its norms are those of what it was trained on.
    """
    first, second = request.param
    torch.manual_seed(0)
    sizes = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).save_pretrained(tmp_path / "base")
    sft = train(tmp_path / "base", tmp_path / "sft", dora=first, seed=1)
    merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), sft)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged-by-peft")
    dpo = train(tmp_path / "merged-by-peft", tmp_path / "dpo", dora=second, seed=2)
    both = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "merged-by-peft"), dpo)
    want = {name: x.clone() for name, x in both.merge_and_unload().state_dict().items()}
    return tmp_path / "base", sft, dpo, want


def named(dpo: Path, base: object) -> None:
    """Let an adapter name another base."""
    edit_json(dpo / CONFIG, base_model_name_or_path=str(base))


def warned(warnings, first: str = "sft", second: str = "dpo") -> list[str]:
    """The warnings that say what merging both at once is, and what to do."""
    pattern = rf"{second}.*trained on.*{first}"
    return [text for text in warnings if re.search(pattern, text) and "sum" in text and "first" in text]


def matters(adapter: Path) -> bool:
    """Whether the order matters to an adapter: it is a DoRA."""
    return bool(json.loads((adapter / CONFIG).read_text())["use_dora"])


def trained_on_its_folder(_, sft, dpo):
    named(dpo, sft)


def trained_on_its_name(_, sft, dpo):
    named(dpo, f"org/{sft.name}")


def trained_on_our_merge(base, sft, dpo):
    dora_convert.merge(base, sft, sft.parent / "merged")
    named(dpo, sft.parent / "merged")


def trained_on_our_merge_of_a_copy(base, sft, dpo):
    """The folder that was merged has another name than the one that is given now; the receipt has its hashes."""
    shutil.copytree(sft, sft.parent / "checkpoint-100")
    dora_convert.merge(base, sft.parent / "checkpoint-100", sft.parent / "merged")
    named(dpo, sft.parent / "merged")


WAYS = [trained_on_its_folder, trained_on_its_name, trained_on_our_merge, trained_on_our_merge_of_a_copy]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_merged_at_once_it_is_said(chain, tmp_path, way):
    """In any order of the two, planned, merged and verified; not where the sum is the chain."""
    base, sft, dpo, _ = chain
    way(base, sft, dpo)
    found = [
        dora_convert.merge(base, [sft, dpo], tmp_path / "out"),
        dora_convert.merge(base, [dpo, sft], tmp_path / "turned"),
        dora_convert.merge(base, [sft, dpo], tmp_path / "dry", dry_run=True),
        dora_convert.verify(base, [sft, dpo], tmp_path / "out"),
    ]
    assert [len(warned(report.warnings)) for report in found] == [matters(dpo)] * 4


def test_the_sum_is_not_the_chain(chain, tmp_path):
    """What the warning is for; and the two merges that it names are right, to a rounding."""
    base, sft, dpo, want = chain
    dora_convert.merge(base, [sft, dpo], tmp_path / "sum")
    dora_convert.merge(base, sft, tmp_path / "one")
    dora_convert.merge(tmp_path / "one", dpo, tmp_path / "two")
    got, both = load(tmp_path / "two"), load(tmp_path / "sum")
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=1e-4, atol=1e-5)
    far = max(float((both[name] - x).norm() / x.norm()) for name, x in want.items() if name in both)
    assert far > 0.1 if matters(dpo) else far < 1e-5


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_right_way_is_not_warned_of(chain, tmp_path, way):
    """One after the other: BASE is what dpo was trained on, whichever of its names the config has."""
    base, sft, dpo, _ = chain
    way(base, sft, dpo)
    one = dora_convert.merge(base, sft, tmp_path / "one")
    two = dora_convert.merge(tmp_path / "one", dpo, tmp_path / "two")
    assert not [text for text in (*one.warnings, *two.warnings) if "trained on" in text]


def test_dpo_without_sft_is_warned_of(chain, tmp_path):
    """Merged into the first base alone, half of the training is missing."""
    base, sft, dpo, _ = chain
    trained_on_our_merge(base, sft, dpo)
    report = dora_convert.merge(base, dpo, tmp_path / "out")
    assert any("dpo" in text and "trained on" in text for text in report.warnings)


def same(got, want):
    """To a rounding of float32; PEFT computes the norms in float32, too."""
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=1e-4, atol=1e-5)


def test_a_chain_is_what_was_trained(chain, tmp_path):
    """--method chain is PEFT's chain, is not warned of, is verified, and is warned of in the wrong order."""
    base, sft, dpo, want = chain
    trained_on_our_merge(base, sft, dpo)
    report = dora_convert.merge(base, [sft, dpo], tmp_path / "out", method="chain")
    assert report.verified.wrong_elements == 0
    same(load(tmp_path / "out"), want)
    checked = dora_convert.verify(base, [sft, dpo], tmp_path / "out")
    assert checked.verdict == "agree"
    assert not [text for text in (*report.warnings, *checked.warnings) if "trained on" in text]
    turned = dora_convert.merge(base, [dpo, sft], tmp_path / "turned", method="chain")
    assert any("another order" in text for text in turned.warnings)
    if matters(dpo):
        assert dora_convert.verify(base, [sft, dpo], tmp_path / "turned", method="chain").verdict == "differ"


@pytest.mark.parametrize("chain", [(True, True)], indirect=True)
def test_a_chain_of_three(chain, tmp_path):
    """Against three merges by PEFT."""
    base, sft, dpo, _ = chain
    model = LlamaForCausalLM.from_pretrained(tmp_path / "merged-by-peft")
    PeftModel.from_pretrained(model, dpo).merge_and_unload().save_pretrained(tmp_path / "two")
    third = train(tmp_path / "two", tmp_path / "kto", dora=True, seed=3)
    both = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "two"), third)
    dora_convert.merge(base, [sft, dpo, third], tmp_path / "out", method="chain")
    same(load(tmp_path / "out"), both.merge_and_unload().state_dict())


@pytest.mark.parametrize("chain", [(True, True)], indirect=True)
def test_an_adapter_of_an_adapter(chain, tmp_path):
    """Without BASE, the chain is followed down to the model; verify and the receipt know all of its links."""
    _, sft, dpo, want = chain
    named(dpo, sft)
    said = []
    report = dora_convert.merge(None, dpo, tmp_path / "out", on_notice=said.append)
    same(load(tmp_path / "out"), want)
    assert [Path(name).name for name in report.adapters] == ["sft", "dpo"]
    assert any("chain: dpo was trained on sft, an adapter" in text for text in said)
    assert dora_convert.verify(None, dpo, tmp_path / "out").verdict == "agree"
    with pytest.raises(UsageError, match="weight"):
        dora_convert.merge(None, dpo, tmp_path / "half", weight=0.5)
    named(sft, dpo)
    with pytest.raises(RefError, match="comes back"):
        dora_convert.merge(None, dpo, tmp_path / "round")


@pytest.mark.parametrize("chain", [(False, False)], indirect=True)
def test_a_chain_of_loras_is_said_to_be_one(chain, tmp_path):
    """The sum of LoRAs is the chain: that is said, too."""
    base, sft, dpo, _ = chain
    named(dpo, sft)
    report = dora_convert.merge(base, [sft, dpo], tmp_path / "out")
    assert len([text for text in report.warnings if "looks like a chain" in text and "same weights" in text]) == 1


def test_two_adapters_of_one_base_are_a_sum(chain, tmp_path):
    """Nothing to say where both were trained on BASE, or where the second names some other model."""
    base, sft, dpo, _ = chain
    for number, name in enumerate((base, base.name, "org/another-model")):
        named(dpo, name)
        report = dora_convert.merge(base, [sft, dpo], tmp_path / f"out{number}")
        assert not warned(report.warnings)


def test_three_in_a_row(chain, tmp_path):
    """Each link is named."""
    base, sft, dpo, _ = chain
    third = shutil.copytree(dpo, tmp_path / "kto")
    tensors = load_file(third / "adapter_model.safetensors")
    save_file({name: x * 1.1 for name, x in tensors.items()}, third / "adapter_model.safetensors")
    named(dpo, sft)
    named(third, dpo)
    report = dora_convert.merge(base, [sft, dpo, third], tmp_path / "out")
    assert bool(warned(report.warnings)) == bool(warned(report.warnings, "dpo", "kto")) == matters(dpo)
    assert not warned(report.warnings, "sft", "kto")
