"""Layers written out or left out, new heads, and dumps with other names."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import PlanError

from .test_kinds import (
    EMBEDDING,
    head,
    tied,  # noqa: F401 - fixtures
)
from .toy import HIDDEN, edit_json, load, make_adapter, make_base, write_json, write_shards


def test_other_dtypes_are_passed_through(tmp_path, base, adapter):
    """fp8, integers, scalars and empty tensors come out as they went in."""
    odd = {
        "odd.fp8": torch.randn(6, 5).to(torch.float8_e4m3fn),
        "odd.long": torch.arange(7),
        "odd.bool": torch.tensor([True, False]),
        "odd.scalar": torch.tensor(2.5),
        "odd.empty": torch.empty(0, 4),
        "odd.double": torch.randn(3, 2, dtype=torch.float64),
    }
    write_shards(base.path, base.tensors | odd, 2)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    merged = load(tmp_path / "out")
    for name, tensor in odd.items():
        assert merged[name].dtype == tensor.dtype, name
        got, want = (found.reshape(-1).view(torch.uint8) for found in (merged[name], tensor))
        assert torch.equal(got, want), name
    dora_convert.merge(base.path, adapter, tmp_path / "float", dtype="float32")
    merged = load(tmp_path / "float")
    assert merged["odd.fp8"].dtype == torch.float8_e4m3fn
    assert merged["odd.double"].dtype == torch.float32


@pytest.mark.parametrize("infix", ["_orig_mod.", "_fsdp_wrapped_module.", "module."])
def test_wrapped_names(tmp_path, base, adapter, infix):
    """torch.compile, FSDP and DataParallel leave their names; the same bytes come out."""
    dora_convert.merge(base.path, adapter, tmp_path / "plain")
    path = adapter / "adapter_model.safetensors"
    tensors = {k.replace("base_model.model.", f"base_model.model.{infix}"): v for k, v in load_file(path).items()}
    save_file(tensors, path)
    dora_convert.merge(base.path, adapter, tmp_path / "wrapped")
    plain, wrapped = load(tmp_path / "plain"), load(tmp_path / "wrapped")
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


def test_a_prefix_that_could_be_two(tmp_path):
    """Two towers with the same names: the adapter does not say which, so neither is taken."""
    base = make_base(tmp_path / "base")
    towers = {
        name.replace("model.", f"{tower}.model."): tensor.clone()
        for tower in ("left", "right")
        for name, tensor in base.tensors.items()
    }
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    write_shards(base.path, towers, 2)
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "could be any of left.model.layers" in caught.value.text()


def test_layers_written_out(tmp_path, base):
    """Each replica gets its own adapter; lists that have an entry a layer follow, and the order is the adapter's."""
    edit_json(base.path / "config.json", num_hidden_layers=2, layer_types=["full", "sliding"])
    replicated = make_base(tmp_path / "three", layers=3)
    adapter = make_adapter(
        tmp_path / "adapter", replicated, dora=True, layer_replication=[[0, 2], [0, 1]], targets=("up_proj",)
    )
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    merged = load(tmp_path / "out")
    norm = "model.layers.{}.input_layernorm.weight"
    assert torch.equal(merged[norm.format(2)], base.tensors[norm.format(0)])
    up = "model.layers.{}.mlp.up_proj.weight"
    assert not torch.equal(merged[up.format(2)], merged[up.format(0)])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert config["layer_types"] == ["full", "sliding", "full"]
    receipt = json.loads((tmp_path / "out/dora_convert/receipt.json").read_text())
    assert receipt["tensors"][up.format(2)]["of"] == up.format(0)


def test_layers_left_out(tmp_path, base):
    """A shard that held nothing but such layers is not written."""
    names = sorted(base.tensors, key=lambda name: ".1." in name)
    inside = [name for name in names if ".1." in name]
    for path in base.path.glob("*.safetensors"):
        path.unlink()
    files = {"model-00001-of-00002.safetensors": [n for n in names if n not in inside]}
    files["model-00002-of-00002.safetensors"] = inside
    for file, mine in files.items():
        save_file({name: base.tensors[name] for name in mine}, base.path / file)
    table = {name: file for file, mine in files.items() for name in mine}
    write_json(base.path / "model.safetensors.index.json", {"metadata": {}, "weight_map": table})
    one = make_base(tmp_path / "one", layers=1)
    adapter = make_adapter(tmp_path / "a", one, dora=True, layer_replication=[[0, 1]])
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert not any(".1." in name for name in load(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_a_new_head(tmp_path, base):
    """A classifier that the base lacks is added, with the class and the labels it needs."""
    extra = {"base_model.model.score.weight": torch.randn(5, HIDDEN)}
    adapter = make_adapter(
        tmp_path / "a", base, dora=False, extra=extra, modules_to_save=["score"], task_type="SEQ_CLS"
    )
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert report.tensors["added"] == 1
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == len(config["label2id"]) == 5
    assert torch.equal(load(tmp_path / "out")["score.weight"], extra["base_model.model.score.weight"])


def test_saved_modules_of_a_raw_dump(tmp_path, base):
    """Savers other than PEFT's leave its wrappers in the names."""
    value = torch.randn(HIDDEN)
    extra = {
        "base_model.model.model.norm.modules_to_save.default.weight": value,
        "base_model.model.model.norm.original_module.weight": torch.randn(HIDDEN),
    }
    adapter = make_adapter(tmp_path / "a", base, dora=False, extra=extra, modules_to_save=["norm"])
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")["model.norm.weight"], value.bfloat16())
    fates = {entry["tensor"]: entry["fate"] for entry in report.ledger}
    assert fates["base_model.model.model.norm.original_module.weight"] == "ignored"


def test_a_swollen_shard_is_cut_again(tmp_path, tied):
    """A head that would make a shard much larger than the base's largest gets its place by another cut."""
    tied.tensors = {name: tensor for name, tensor in tied.tensors.items() if "mlp" not in name}
    adapter = make_adapter(tmp_path / "head", tied, dora=False, targets=("k_proj",), extra=head())
    names = list(tied.tensors)
    table = {name: f"model-{n + 1:05d}-of-{len(names):05d}.safetensors" for n, name in enumerate(names)}
    for path in tied.path.glob("*.safetensors"):
        path.unlink()
    for name, file in table.items():
        save_file({name: tied.tensors[name]}, tied.path / file)
    write_json(tied.path / "model.safetensors.index.json", {"metadata": {}, "weight_map": table})
    dora_convert.merge(tied.path, adapter, tmp_path / "out")
    shards = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    largest = tied.tensors[EMBEDDING].nbytes
    assert max(sum(tensor.nbytes for tensor in shard.values()) for shard in shards) == largest
    assert load(tmp_path / "out").keys() == {*tied.tensors, "lm_head.weight"}
