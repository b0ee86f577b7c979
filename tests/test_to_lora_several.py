"""One LoRA of several adapters: what PEFT computes with it is what the adapters do together."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import dora_convert
from dora_convert.errors import UnsupportedError

from .test_formats import GOLDEN, adapter_of
from .toy import exact, load, low_rank, make_adapter, make_base

WEIGHTS = [0.7, 1.3]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    base = make_base(folder / "base", torch.float32, layers=1)
    return folder, base


def changes_of(out, base):
    """BA of each module of a LoRA, by the base's names."""
    adapter, config = (
        load_file(out / "adapter_model.safetensors"),
        json.loads((out / "adapter_config.json").read_text()),
    )
    assert config["lora_alpha"] == config["r"]
    assert not config["use_dora"]
    names = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in adapter if "lora_A" in name
    }
    return {f"{name}.weight": low_rank(adapter, name) for name in names}


def test_loras_side_by_side(case, tmp_path):
    """The sum of two LoRAs has the sum of their ranks, and nothing is lost, with one module that only one has."""
    _, base = case
    adapters = [
        make_adapter(tmp_path / "a", base, dora=False, seed=2),
        make_adapter(tmp_path / "b", base, dora=False, seed=3, targets=("mlp.up_proj", "self_attn.q_proj"), rank=2),
    ]
    report = dora_convert.to_lora(base.path, adapters, tmp_path / "out", rank=6, weight=WEIGHTS)
    assert report.relative_error < 1e-6
    got, merged = changes_of(tmp_path / "out", base), [exact(base, adapters[0]), exact(base, adapters[1], scale=3.0)]
    for name, x in base.tensors.items():
        want = sum(w * (each[name] - x.double()) for w, each in zip(WEIGHTS, merged, strict=True))
        assert bool(want.any()) == (name in got)
        if name in got:
            torch.testing.assert_close(got[name], want, rtol=0, atol=1e-6)


def test_doras_by_ties(case, tmp_path):
    """At full rank, the LoRA adds what the merge adds."""
    _, base = case
    adapters = [make_adapter(tmp_path / str(seed), base, dora=True, seed=seed) for seed in (2, 3)]
    options = {"method": "ties", "density": [0.5, 0.3], "weight": WEIGHTS}
    dora_convert.to_lora(base.path, adapters, tmp_path / "out", rank=40, exact_svd=True, **options)
    dora_convert.merge(base.path, adapters, tmp_path / "merged", **options)
    merged = load(tmp_path / "merged")
    for name, change in changes_of(tmp_path / "out", base).items():
        torch.testing.assert_close(base.tensors[name].double() + change, merged[name].double(), rtol=0, atol=2e-6)
    again = dora_convert.to_lora(base.path, adapters, tmp_path / "small", rank=3, **options)
    assert 0.1 < again.relative_error < 1


@pytest.mark.parametrize("tools", [("peft-loha", "peft-oft"), ("lycoris-lokr", "mlx-lora")])
def test_other_kinds(tmp_path, tools):
    """Whatever the adapters add together, factors of full rank hold it: merged, both ways are the same."""
    adapters = [adapter_of(tool) for tool in tools]
    dora_convert.merge(GOLDEN / "base-2", adapters, tmp_path / "merged", dtype="float32")
    options = {"rank": 64, "exact_svd": True}
    report = dora_convert.to_lora(GOLDEN / "base-2", adapters, tmp_path / "one", **options)
    dora_convert.merge(GOLDEN / "base-2", tmp_path / "one", tmp_path / "again", dtype="float32")
    merged, again = load(tmp_path / "merged"), load(tmp_path / "again")
    assert len(report.modules) >= 6
    for name, value in merged.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=2e-6)


def test_what_no_lora_holds_is_refused(case, tmp_path):
    _, base = case
    head = {"base_model.model.lm_head.weight": torch.ones(base.tensors["lm_head.weight"].shape)}
    adapters = [
        make_adapter(tmp_path / "a", base, dora=False, seed=2),
        make_adapter(tmp_path / "b", base, dora=False, seed=3, modules_to_save=["lm_head"], extra=head),
    ]
    with pytest.raises(UnsupportedError) as caught:
        dora_convert.to_lora(base.path, adapters, tmp_path / "out", rank=6)
    assert "lm_head.weight" in caught.value.text()
    assert dora_convert.to_lora(base.path, adapters, tmp_path / "out", rank=8, exclude="lm_head").relative_error < 1e-6
