"""extract on models whose experts are a stack in memory: PEFT loads what it writes, and the outputs are TUNED's."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import PlanError

E, H, INNER, RANK = 3, 12, 20, 2
MOE = "model.layers.0.block_sparse_moe."


@pytest.fixture
def mixtral(tmp_path):
    """A base with Mixtral's names on the Hub, and a copy with a change of rank 2 in each expert and the router."""
    torch.manual_seed(0)
    shapes = {"w1": (INNER, H), "w2": (H, INNER), "w3": (INNER, H)}
    base = {f"{MOE}experts.{e}.{name}.weight": torch.randn(size) for e in range(E) for name, size in shapes.items()}
    base |= {f"{MOE}gate.weight": torch.randn(E, H), "model.norm.weight": torch.randn(H)}
    base["model.layers.0.self_attn.q_proj.weight"] = torch.randn(H, H)
    tuned = dict(base)
    for e in range(E):
        right = torch.randn(RANK, H)
        for name in ("w1", "w3"):
            tuned[f"{MOE}experts.{e}.{name}.weight"] = base[f"{MOE}experts.{e}.{name}.weight"] + (
                torch.randn(INNER, RANK) @ right
            )
    tuned[f"{MOE}gate.weight"] = base[f"{MOE}gate.weight"] + torch.randn(E, 1) @ torch.randn(1, H)
    for folder, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
        config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "tie_word_embeddings": False}
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    return base, tuned


@pytest.mark.parametrize("ranks", ["one", "per-module"])
def test_experts_get_one_pair_of_factors(tmp_path, mixtral, ranks):
    """Gate and up of all experts are one parameter; its factors lie as PEFT reads them, at the rank that is needed."""
    base, tuned = mixtral
    dora_convert.extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", kind="lora", max_error=1e-5, ranks=ranks
    )
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["target_modules"], config["target_parameters"]) == ([], ["experts.gate_up_proj", "gate.weight"])
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    names = ("mlp.experts.lora_A", "mlp.experts.lora_B", "mlp.gate.lora_A", "mlp.gate.lora_B")
    found = [tensors[f"base_model.model.model.layers.0.{name}.weight"] for name in names]
    A, B, gate_A, gate_B = found
    assert len(tensors) == len(found)
    assert A.shape == (E * RANK, H)
    for e in range(E):
        product = B[:, e::E] @ A[e * RANK : (e + 1) * RANK]
        halves = [f"{MOE}experts.{e}.{name}.weight" for name in ("w1", "w3")]
        assert torch.allclose(product, torch.cat([tuned[name] - base[name] for name in halves]), atol=1e-3)
    assert len(gate_A) == (RANK if ranks == "one" else 1)
    assert torch.allclose(gate_B @ gate_A, tuned[f"{MOE}gate.weight"] - base[f"{MOE}gate.weight"], atol=1e-3)


def test_experts_have_no_dora(tmp_path, mixtral):
    """PEFT refuses DoRA on parameters: the fault names the parameter and the ways out."""
    with pytest.raises(PlanError) as caught:
        dora_convert.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2, kind="dora")
    faults = {fault.what: fault.why for fault in caught.value.faults}
    assert "no DoRA" in faults["model.layers.0.mlp.experts.gate_up_proj"]


def test_a_stack_that_is_one_tensor_on_disk(tmp_path):
    """Experts stored as (in, out), with biases of their own: four parameters of one module."""
    torch.manual_seed(0)
    experts = "model.layers.0.mlp.experts."
    base = {f"{experts}gate_up_proj": torch.randn(E, H, INNER), f"{experts}gate_up_proj_bias": torch.randn(E, INNER)}
    base |= {f"{experts}down_proj": torch.randn(E, INNER, H)}
    tuned = {f"{experts}gate_up_proj": base[f"{experts}gate_up_proj"] + torch.randn(E, H, 1) @ torch.randn(E, 1, INNER)}
    tuned[f"{experts}down_proj"] = base[f"{experts}down_proj"] + torch.randn(E, INNER, 1) @ torch.randn(E, 1, H)
    tuned[f"{experts}gate_up_proj_bias"] = base[f"{experts}gate_up_proj_bias"] + torch.ones(E, INNER)
    for folder, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    report = dora_convert.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", kind="lora", rank=1)
    assert report.relative_error < 1e-5
    names = load_file(tmp_path / "out/adapter_model.safetensors")
    assert sum("experts.base_layer.base_layer.lora_A" in name for name in names) == 1
    dora_convert.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.allclose(merged[name], tensor, atol=1e-4) for name, tensor in tuned.items())
