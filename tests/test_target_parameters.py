"""`target_parameters` names parameters by the ends of their names: only modules that have such a one are meant."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import dora_convert
from dora_convert.errors import DoraConvertError

from .toy import load, write_json

E, H, INNER, RANK = 3, 12, 12, 2
LAYER = "model.layers.0"


def merged(tmp_path, base: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], **config) -> dict:
    """Merge an adapter given by modules into a base; return the differences by name."""
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    save_file(base, tmp_path / "base/model.safetensors", {"format": "pt"})
    write_json(tmp_path / "base/config.json", {"model_type": "toy", "architectures": ["ToyForCausalLM"]})
    tensors = {f"base_model.model.{LAYER}.{name}.weight": tensor for name, tensor in adapter.items()}
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "peft_version": "0.21.2", **config}
    write_json(tmp_path / "adapter/adapter_config.json", fields)
    dora_convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    return {name: tensor - base[name] for name, tensor in load(tmp_path / "out").items()}


def pair(module: str, rows: int, columns: int, experts: int = 1, rank: int = RANK) -> dict[str, torch.Tensor]:
    """Factors of a module's parameter (rows, columns)."""
    A, B = torch.randn(experts * rank, columns), torch.randn(rows, rank * experts)
    return {f"{module}.lora_A": A, f"{module}.lora_B": B}


def product(adapter: dict[str, torch.Tensor], module: str, rank: int = RANK) -> torch.Tensor:
    """BA of each expert, (experts, rows, columns)."""
    A, B = adapter[f"{module}.lora_A"], adapter[f"{module}.lora_B"]
    count = len(A) // rank
    return torch.stack([B[:, e::count] @ A[e * rank : (e + 1) * rank] for e in range(count)])


def base_of(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"{LAYER}.{name.replace('__', '.')}": torch.randn(shape) for name, shape in shapes.items()}


def test_a_router_has_no_parameters_of_experts(tmp_path):
    """What PEFT makes of all-linear: two parameters of experts without owners, and the router's weight."""
    base = base_of(
        mlp__gate__weight=(E, H), mlp__experts__gate_up_proj=(E, 2 * INNER, H), mlp__experts__down_proj=(E, H, INNER)
    )
    adapter = {
        **pair("mlp.gate", E, H),
        **pair("mlp.experts.base_layer", 2 * INNER, H, E, 2 * RANK),
        **pair("mlp.experts", H, INNER, E),
    }
    got = merged(
        tmp_path, base, adapter,
        target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj", "gate.weight"],
        rank_pattern={r".*\.gate_up_proj": 2 * RANK}, alpha_pattern={r".*\.gate_up_proj": 2 * RANK},
    )  # fmt: skip
    assert torch.allclose(got[f"{LAYER}.mlp.gate.weight"], product(adapter, "mlp.gate")[0], atol=1e-4)
    for name, module, rank in (("gate_up_proj", ".base_layer", 2 * RANK), ("down_proj", "", RANK)):
        change = product(adapter, f"mlp.experts{module}", rank)
        assert torch.allclose(got[f"{LAYER}.mlp.experts.{name}"], change, atol=1e-4), name


@pytest.mark.parametrize("listed", [["up_proj", "down_proj"], ["gate_up_proj", "up_proj", "down_proj"]])
def test_experts_without_gates_have_up_proj_innermost(tmp_path, listed):
    """Shapes that fit both ways are told apart by the order in which modules register parameters."""
    base = base_of(mixer__experts__up_proj=(E, INNER, H), mixer__experts__down_proj=(E, H, INNER))
    adapter = {**pair("mixer.experts.base_layer", INNER, H, E), **pair("mixer.experts", H, INNER, E)}
    got = merged(tmp_path, base, adapter, target_modules=[], target_parameters=listed)
    up, down = (product(adapter, f"mixer.experts{end}") for end in (".base_layer", ""))
    assert torch.allclose(got[f"{LAYER}.mixer.experts.up_proj"], up, atol=1e-4)
    assert torch.allclose(got[f"{LAYER}.mixer.experts.down_proj"], down, atol=1e-4)


def test_a_module_that_a_regex_targets_is_no_owner_of_parameters(tmp_path):
    """A parameter without owner beside a regular expression leaves the expression's modules alone."""
    base = base_of(self_attn__q_proj__weight=(H, H + 2), mlp__experts__down_proj=(E, H, INNER))
    adapter = {**pair("self_attn.q_proj", H, H + 2), **pair("mlp.experts", H, INNER, E)}
    got = merged(tmp_path, base, adapter, target_modules=r".*q_proj", target_parameters=["down_proj"])
    assert torch.allclose(got[f"{LAYER}.self_attn.q_proj.weight"], product(adapter, "self_attn.q_proj")[0], atol=1e-4)
    assert torch.allclose(got[f"{LAYER}.mlp.experts.down_proj"], product(adapter, "mlp.experts"), atol=1e-4)


def test_a_parameter_that_only_some_modules_have(tmp_path):
    """Of three listed parameters, the base's only one is meant."""
    base = base_of(moe__input_linear__weight=(E, 2 * INNER, H), moe__other__w2=(E, H, INNER))
    adapter = {**pair("moe.input_linear", 2 * INNER, H, E), **pair("moe.other", H, INNER, E)}
    got = merged(tmp_path, base, adapter, target_modules=[], target_parameters=["input_linear.weight", "w1", "w2"])
    assert torch.allclose(got[f"{LAYER}.moe.input_linear.weight"], product(adapter, "moe.input_linear"), atol=1e-4)
    assert torch.allclose(got[f"{LAYER}.moe.other.w2"], product(adapter, "moe.other"), atol=1e-4)


def test_ranks_that_differ_do_not_say_which_parameter_is_meant(tmp_path):
    """Two possible parameters of different scalings are refused, with both names."""
    base = base_of(moe__w2=(E, H, INNER))
    with pytest.raises(DoraConvertError) as caught:
        merged(
            tmp_path, base, pair("moe", H, INNER, E),
            target_modules=[], target_parameters=["w1", "w2"], alpha_pattern={"w1": 7},
        )  # fmt: skip
    assert "w1" in str(caught.value.faults[0].why)
