"""Plans: every adapter tensor has a place or a reason, and all faults come at once."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.adapters import low_rank
from dora_convert.errors import DoraConvertError, MalformedError, PlanError
from dora_convert.plan.plan import Options
from dora_convert.plan.planner import make_plan
from dora_convert.sources import Session
from dora_convert.sources.inputs import open_inputs

from .toy import edit_json, make_adapter

PREFIX = "base_model.model.model.layers.0"


def plan_of(base, *adapters, **options):
    refs = [str(path) for path in adapters]
    checkpoint, opened = open_inputs(str(base.path), refs, Session(), out="out")
    return make_plan(checkpoint, opened, [1.0] * len(opened), Options(**options))


def change(adapter, **tensors):
    """Add, replace or (with None) remove tensors of an adapter file; names relative to layer 0."""
    path = adapter / "adapter_model.safetensors"
    found = load_file(path)
    for name, tensor in tensors.items():
        found.pop(f"{PREFIX}.{name}", None)
        if tensor is not None:
            found[f"{PREFIX}.{name}"] = tensor
    save_file(found, path)


def faults_of(base, adapter):
    with pytest.raises(DoraConvertError) as caught:
        plan_of(base, adapter)
    return caught.value


def test_a_plan_is_pure(base, adapter):
    """Equal inputs give equal plans and fingerprints; another option gives another."""
    first, second = plan_of(base, adapter), plan_of(base, adapter)
    assert first == second
    assert first.fingerprint == second.fingerprint
    assert plan_of(base, adapter, dtype="F32").fingerprint != first.fingerprint
    assert plan_of(base, adapter, undo="none").fingerprint != first.fingerprint


def test_every_module_of_a_wrong_form_is_a_fault(base, adapter):
    """Modules of one form are checked once if the form is right; of a wrong form, each one is named."""
    wrong = {f"self_attn.{name}.lora_A.weight": torch.ones(5, 40) for name in ("q_proj", "v_proj")}
    change(adapter, **wrong)
    assert {fault.what for fault in faults_of(base, adapter).faults} == {
        f"{PREFIX.removeprefix('base_model.model.')}.self_attn.{name}" for name in ("q_proj", "v_proj")
    }


@pytest.mark.parametrize("undo", ["norms", "exact"])
@pytest.mark.parametrize("dora", [False, True])
def test_costs_are_those_of_every_weight(tmp_path, base, dora, undo):
    """Costs that are counted once for each kind of weight are those of the weights counted one by one."""
    plan = plan_of(base, make_adapter(tmp_path / "again", base, dora=dora), undo=undo)
    assert plan.memory == max(map(plan.cost, plan.items))
    exact = [undo == "exact" and plan.remembers(item) for item in plan.items]
    assert plan.undo_bytes == sum(item.undo_bytes(exact=one) for item, one in zip(plan.items, exact, strict=True))


def test_every_base_tensor_is_made_once(base, adapter):
    """The plan's items are the base's tensors, each in one shard."""
    names = [item.name for item in plan_of(base, adapter).items]
    assert sorted(names) == sorted(base.tensors)


def test_all_faults_in_one_error(base, adapter):
    """An unknown module, a wrong shape and a tensor of the wrong length are reported together."""
    change(
        adapter,
        **{
            "self_attn.qkv_proj.lora_A.weight": torch.ones(4, 40),
            "self_attn.qkv_proj.lora_B.weight": torch.ones(96, 4),
            "self_attn.qkv_proj.lora_magnitude_vector": torch.ones(96),
            "mlp.up_proj.lora_A.weight": torch.ones(4, 41),
            "mlp.down_proj.lora_magnitude_vector": torch.ones(41),
        },
    )
    error = faults_of(base, adapter)
    assert isinstance(error, PlanError)
    text = error.text(limit=20)
    assert len(error.faults) == 9
    assert "closest: …q_proj, …k_proj" in text
    assert "lora_A (4, 41)" in text
    assert "magnitude has 41 elements for 40 outputs" in text


def test_ten_faults_are_shown_and_all_are_kept(base, tmp_path):
    """The text stops at ten; the JSON has every one."""
    adapter = make_adapter(tmp_path / "many", base, dora=False)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k.replace("layers", "blocks"): v for k, v in tensors.items()}, adapter / "adapter_model.safetensors")
    error = faults_of(base, adapter)
    assert "… and 2 more" in error.text()
    assert len(error.to_dict()["error"]["faults"]) == 12
    assert error.text().splitlines()[0] == "12 adapter tensors have no place in the base."


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mlp.up_proj.lora_A.weight": None}, "has no lora_A"),
        ({"mlp.up_proj.lora_B.weight": None}, "has no lora_B"),
        ({"mlp.up_proj.lora_magnitude_vector": None}, "has no lora_magnitude_vector"),
        ({"mlp.up_proj.lora_A.weight": torch.ones(5, 40)}, "the config says rank 4"),
        ({"mlp.up_proj.lora_B.weight": torch.ones(96, 5)}, "the config says rank 4"),
        ({"mlp.up_proj.lora_B.bias": torch.ones(96)}, "DoRA has no bias"),
        ({"mlp.up_proj.lora_magnitude_vector.weight": torch.ones(96)}, "says already"),
        ({"mlp.up_proj.lora_B.weight": torch.ones(96, 4, dtype=torch.int8)}, "is stored as I8"),
        ({"mlp.up_proj.lora_A.weight": torch.ones(4, 40).to(torch.float8_e4m3fn)}, "is stored as F8_E4M3"),
        ({"mlp.up_proj.lora_A": torch.ones(4, 40)}, "says already"),
        ({"mlp.up_proj.lora_E": torch.ones(4, 1)}, "the config says it is neither"),
        ({"mlp.gate.weight": torch.ones(4, 40)}, "neither a LoRA tensor"),
    ],
)
def test_adapters_that_contradict_themselves(base, adapter, tensors, message):
    """Half pairs, wrong ranks, missing magnitudes and unknown tensors are errors that name the tensor."""
    change(adapter, **tensors)
    error = faults_of(base, adapter)
    assert message in error.text()
    assert "mlp" in error.text()


def test_magnitudes_without_use_dora(base, adapter):
    """Silently ignoring them would merge another function than was trained."""
    edit_json(adapter / "adapter_config.json", use_dora=False)
    assert "but use_dora is not set" in faults_of(base, adapter).text()


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0}, {"r": "4"}, {"r": 4.0}, {"r": True}, {"lora_alpha": 0}, {"lora_alpha": "8"},
        {"use_rslora": "yes"}, {"use_dora": 1}, {"rank_pattern": []}, {"rank_pattern": {"(": 4}},
        {"alpha_pattern": {"x": 0}}, {"modules_to_save": "head"}, {"modules_to_save": [3]},
        {"base_model_name_or_path": 3},
    ],
    ids=str,
)  # fmt: skip
def test_config_values_of_wrong_types(base, adapter, fields):
    """Each field that counts is checked, and named."""
    edit_json(adapter / "adapter_config.json", **fields)
    error = faults_of(base, adapter)
    assert isinstance(error, MalformedError)
    assert next(iter(fields)) in str(error)


def test_a_negative_alpha_subtracts(base, adapter):
    """As in PEFT, and a warning says it."""
    scale = plan_of(base, adapter).adapters[0].changes[0].update
    config = json.loads((adapter / "adapter_config.json").read_text())
    edit_json(adapter / "adapter_config.json", lora_alpha=-config["lora_alpha"])
    plan = plan_of(base, adapter)
    assert low_rank(plan.adapters[0].changes[0].update).scale == -low_rank(scale).scale
    assert any("is subtracted" in warning for warning in plan.warnings)


def test_old_magnitude_names(base, adapter):
    """`.lora_magnitude_vector.weight`, as some versions write it, is the same tensor."""
    want = plan_of(base, adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = {k + ".weight" * k.endswith("vector"): v for k, v in load_file(path).items()}
    save_file(tensors, path)
    assert [item.edits and item.name for item in plan_of(base, adapter).items] == [
        item.edits and item.name for item in want.items
    ]


def test_unmatched_tensors_may_be_allowed(base, adapter, tmp_path):
    """--allow-unmatched keeps them in the ledger, with the reason; other faults stay errors."""
    extra = {"self_attn.qkv.lora_A.weight": torch.ones(4, 40), "self_attn.qkv.lora_B.weight": torch.ones(9, 4)}
    change(adapter, **extra, **{"self_attn.qkv.lora_magnitude_vector": torch.ones(9)})
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", allow_unmatched=True)
    unmatched = [entry for entry in report.ledger if entry["fate"] == "unmatched"]
    assert len(unmatched) == 3
    assert "closest" in unmatched[0]["why"]
    assert "3 adapter tensors have no place in the base, and are left out" in report.warnings[-1]
    change(adapter, **{"mlp.up_proj.lora_A.weight": torch.ones(4, 41)})
    with pytest.raises(PlanError, match="3 adapter tensors"):
        dora_convert.merge(base.path, adapter, tmp_path / "out2", allow_unmatched=True)


def test_nothing_to_merge(base, adapter):
    """A merge that applies no tensor is an error, not a copy."""
    with pytest.raises(PlanError, match="Nothing to do"):
        plan_of(base, adapter, exclude=("*",))


def test_a_missing_name_says_what_was_tried(base, adapter):
    """If neither the base nor the table of families has a name, the error says which other name was tried."""
    edit_json(base.path / "config.json", model_type="mixtral", architectures=["MixtralForCausalLM"])
    path = adapter / "adapter_model.safetensors"
    renamed = {k.replace("mlp.up", "block_sparse_moe.side"): v for k, v in load_file(path).items()}
    save_file(renamed, path)
    text = faults_of(base, adapter).text()
    assert "no such module, nor model.layers.0.mlp.side_proj" in text
    assert "its name in MixtralForCausalLM; closest: " in text


def test_conv1d_needs_the_model_type():
    """Which square weights are Conv1D depends on the model's type and the module's name."""
    from dora_convert.plan.shapes import is_conv1d

    assert not is_conv1d("h.0.attn.c_proj.weight", frozenset({"llama"}))
    assert is_conv1d("h.0.attn.c_proj.weight", frozenset({"gpt2"}))
    assert not is_conv1d("score.weight", frozenset({"gpt2"}))
