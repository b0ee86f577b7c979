"""Kinds of adapters beyond low rank: combined, compressed, taken out, and refused where no equation helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import DoraConvertError

GOLDEN = Path(__file__).parent / "golden/formats"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def base_of(case: str) -> Path:
    """The base of a golden case."""
    return GOLDEN / CASES[case]["base"]


def merged(base: Path, adapters: object, out: Path, **options: object) -> dict[str, torch.Tensor]:
    """The tensors of a merge."""
    dora_convert.merge(base, adapters, out, **options)
    return load_file(out / "model.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of two tensors of the same name."""
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


@pytest.mark.parametrize("case", ["peft-loha", "peft-lokr", "peft-oft", "peft-vera"])
def test_a_lora_of_any_kind(tmp_path, case):
    """Factors of full rank merge to the same weights; from-lora refuses the kind by name."""
    base, adapter = base_of(case), GOLDEN / case
    report = dora_convert.to_lora(base, adapter, tmp_path / "lora", rank=24)
    assert report.relative_error < 1e-5
    assert distance(merged(base, tmp_path / "lora", tmp_path / "b"), merged(base, adapter, tmp_path / "a")) < 1e-6
    with pytest.raises(DoraConvertError, match="cannot be DoRA"):
        dora_convert.from_lora(base, adapter, tmp_path / "dora")


def test_scaled_biases_have_no_lora(tmp_path):
    """(IA)³ scales biases, too: to-lora says so, and merge does it."""
    with pytest.raises(DoraConvertError, match="scales 4 biases"):
        dora_convert.to_lora(base_of("peft-ia3"), GOLDEN / "peft-ia3", tmp_path / "lora", rank=4)


def test_a_sum_of_kinds(tmp_path):
    """Each change is of the unmerged weight, so the changes of a rotation and of a product add up."""
    base = base_of("peft-oft")
    one, other = GOLDEN / "peft-oft", GOLDEN / "peft-loha"
    both = merged(base, [one, other], tmp_path / "both", weight=[0.5, 2.0], undo="exact")
    W = load_file(base / "model.safetensors")
    changes = [merged(base, each, tmp_path / each.name) for each in (one, other)]
    for name, tensor in both.items():
        wanted = W[name].double() + 0.5 * (changes[0][name] - W[name]) + 2.0 * (changes[1][name] - W[name])
        assert (tensor - wanted).norm() < 1e-6 * wanted.norm()
    assert dora_convert.verify(base, [one, other], tmp_path / "both", weight=[0.5, 2.0]).verdict == "agree"
    dora_convert.unmerge(tmp_path / "both", [one, other], tmp_path / "back")
    assert all(torch.equal(tensor, W[name]) for name, tensor in load_file(tmp_path / "back/model.safetensors").items())
    merged(base, [one, other], tmp_path / "sum", weight=[0.5, 2.0])
    with pytest.raises(DoraConvertError, match="cannot") as caught:
        dora_convert.unmerge(tmp_path / "sum", [one, other], tmp_path / "no")
    assert "OFT" in caught.value.text()


@pytest.mark.parametrize("case", ["peft-ia3", "peft-loha", "peft-lokr", "peft-oft", "peft-vera", "hfadapters-dvora"])
def test_taken_out_by_arithmetic(tmp_path, case):
    """Without a record of roundings, the inverse of each kind finds the base to the last bits."""
    base = base_of(case)
    files = list((GOLDEN / case).iterdir())
    adapter = files[0] if len(files) == 1 else GOLDEN / case
    merged(base, adapter, tmp_path / "out")
    dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert distance(load_file(tmp_path / "back/model.safetensors"), load_file(base / "model.safetensors")) < 1e-6


def test_a_wrong_merge_of_another_kind(tmp_path):
    """The cause is not named after LoRA's mistakes; a weight that was not merged is."""
    base, adapter = base_of("peft-loha"), GOLDEN / "peft-loha"
    merged(base, adapter, tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    good, W = load_file(file), load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    for wrong, cause in ((W[name], "not merged"), (W[name] + 2 * (good[name] - W[name]), None)):
        save_file({**good, name: wrong}, file, {"format": "pt"})
        report = dora_convert.verify(base, adapter, tmp_path / "out").to_dict()
        found = next(module for module in report["modules"] if name.startswith(module["name"]))
        assert report["verdict"] != "agree"
        assert cause in found["cause"] if cause else found["cause"] is None


def test_the_memory_budget_changes_nothing(tmp_path):
    """Blocks depend on shapes alone: one worker or two, any budget."""
    base, adapter = base_of("peft-lokr"), GOLDEN / "peft-lokr"
    one = merged(base, adapter, tmp_path / "one", workers=1)
    two = merged(base, adapter, tmp_path / "two", workers=2, max_memory="1GiB")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_parts_that_contradict_each_other(tmp_path):
    """A missing factor, and a rank that is not the config's, are faults with the module's name."""
    adapter = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "peft-loha", adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith("hada_w2_b"))
    del tensors[gone]
    save_file(tensors, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base_of("peft-loha"), adapter, tmp_path / "out")
    assert "has no hada_w2_b" in caught.value.text()
    assert "the config says rank 2" in caught.value.text()


def test_a_bias_follows_the_norm_of_its_weight(tmp_path):
    """fsdp_qlora's forward scales the bias, too: merged, verified, taken out both ways, and not in place."""
    base, adapter = base_of("peft-ia3"), tmp_path / "model_state_dict.safetensors"
    W = load_file(base / "model.safetensors")
    torch.manual_seed(0)
    tensors, wanted = {}, {}
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj"):
        weight = W[f"{name}.weight"]
        A, B, m = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4), 1 + torch.rand(weight.shape[0])
        tensors |= {f"{name}.dora_layer.lora_A.weight": A, f"{name}.dora_layer.lora_B.weight": B}
        tensors[f"{name}.magnitude_layer.magnitude"] = m
        V = weight.double() + B.double() @ A.double()
        f = m / V.norm(dim=1)
        wanted |= {f"{name}.weight": f[:, None] * V, f"{name}.bias": f * W[f"{name}.bias"]}
    save_file(tensors, adapter)
    for undo in ("exact", "norms"):
        got = merged(base, adapter, tmp_path / undo, undo=undo)
        assert all((got[name] - tensor).norm() < 1e-6 * tensor.norm() for name, tensor in wanted.items())
        dora_convert.unmerge(tmp_path / undo, adapter, tmp_path / f"{undo}-back")
        back = load_file(tmp_path / f"{undo}-back/model.safetensors")
        assert distance(back, W) < (1e-12 if undo == "exact" else 1e-5)
    assert dora_convert.verify(base, adapter, tmp_path / "exact").verdict == "agree"
    merged(base, adapter, tmp_path / "none", undo="none")
    dora_convert.unmerge(tmp_path / "none", adapter, tmp_path / "none-back", base=base)
    assert distance(load_file(tmp_path / "none-back/model.safetensors"), W) < 1e-5
    shutil.copytree(base, tmp_path / "base")
    with pytest.raises(DoraConvertError, match="merge in place"):
        dora_convert.merge(tmp_path / "base", adapter, in_place=True)


def test_scales_of_outputs_are_set_in_place(tmp_path):
    """(IA)³ needs no weight for a bias: in place, the same bytes."""
    shutil.copytree(base_of("peft-ia3"), tmp_path / "base")
    dora_convert.merge(tmp_path / "base", GOLDEN / "peft-ia3", in_place=True)
    wanted = merged(base_of("peft-ia3"), GOLDEN / "peft-ia3", tmp_path / "out")
    got = load_file(tmp_path / "base/model.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_blocks_of_one_tensor_are_several_modules(tmp_path):
    """litgpt's q and v lie in one pair of factors: each module is fitted from its own block."""
    base, adapter = base_of("litgpt-lora-qv"), GOLDEN / "litgpt-lora-qv"
    report = dora_convert.to_lora(base, adapter, tmp_path / "lora", rank=4)
    assert report.relative_error < 1e-5
    dora_convert.from_lora(base, adapter, tmp_path / "dora")
    wanted = merged(base, adapter, tmp_path / "a")
    assert distance(merged(base, tmp_path / "lora", tmp_path / "b"), wanted) < 1e-6
    assert distance(merged(base, tmp_path / "dora", tmp_path / "c"), wanted) < 1e-6


def test_kinds_without_factors_are_no_lora(tmp_path):
    """from-lora refuses them by name, for formats of all tools."""
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.from_lora(base_of("peft-loha"), GOLDEN / "peft-loha", tmp_path / "dora", format="kohya")
    assert "not a LoRA" in caught.value.text()
