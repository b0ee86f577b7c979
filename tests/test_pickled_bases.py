"""Bases and adapters that torch.save wrote, and single files as BASE: the same weights come out as from safetensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import dora_convert
from dora_convert.errors import RefError, UnsupportedError

from .toy import contents, edit_json, exact, load, make_adapter, make_base, rounded, write_json


def as_pickles(base, shards, **options):
    """The base's weights as torch.save writes them, instead of safetensors."""
    for path in base.path.glob("*.safetensors*"):
        path.unlink()
    if shards == 1:
        torch.save(base.tensors, base.path / "pytorch_model.bin", **options)
        return
    names, table = list(base.tensors), {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        mine = names[number::shards]
        torch.save({name: base.tensors[name] for name in mine}, base.path / file, **options)
        table |= dict.fromkeys(mine, file)
    write_json(base.path / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": table})


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_pickled_bases(tmp_path, base, adapter, shards, options):
    """They become safetensors, every element as it should be."""
    want = exact(base, adapter)
    as_pickles(base, shards, **options)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert report.verified.wrong_elements == 0
    merged = load(tmp_path / "out")
    for name, x in want.items():
        assert torch.equal(merged[name], rounded(x, torch.bfloat16)), name
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not any(name.endswith((".bin", ".bin.index.json")) for name in names)
    assert ("model.safetensors" if shards == 1 else "model-00001-of-00002.safetensors") in names


def test_pickled_adapter(tmp_path, base, adapter):
    """adapter_model.bin gives the bytes that adapter_model.safetensors gives."""
    dora_convert.merge(base.path, adapter, tmp_path / "near")
    path = adapter / "adapter_model.safetensors"
    torch.save(load_file(path), adapter / "adapter_model.bin")
    path.unlink()
    dora_convert.merge(base.path, adapter, tmp_path / "far")
    near, far = contents(tmp_path / "near"), contents(tmp_path / "far")
    assert near.keys() == far.keys()
    assert all(near[name] == far[name] for name in near if name.endswith(".safetensors"))


def test_two_names_for_one_storage(tmp_path, base, adapter):
    """Both are written; an adapter on one of them leaves the other, and the config says that they differ."""
    base.tensors["lm_head.weight"] = base.tensors["model.embed_tokens.weight"]
    as_pickles(base, 1)
    config = json.loads((base.path / "config.json").read_text())
    del config["tie_word_embeddings"]
    write_json(base.path / "config.json", config)
    extra = {
        "base_model.model.lm_head.lora_A.weight": torch.randn(4, 40),
        "base_model.model.lm_head.lora_B.weight": torch.randn(72, 4),
    }
    head = make_adapter(tmp_path / "head", base, dora=False, targets=("none",), extra=extra)
    dora_convert.merge(base.path, head, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert torch.equal(merged["model.embed_tokens.weight"], base.tensors["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], base.tensors["lm_head.weight"])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ["model.safetensors", "weights.bin"])
def test_a_single_file(tmp_path, adapter, name):
    """BASE may be one weight file: OUT holds its weights and the record, nothing else."""
    base = make_base(tmp_path / "single", shards=1)
    file = base.path / name
    if name.endswith(".bin"):
        torch.save(base.tensors, file)
    report = dora_convert.merge(file, adapter, tmp_path / "out")
    assert report.verified.wrong_elements == 0
    written = name.replace(".bin", ".safetensors")
    assert set(contents(tmp_path / "out")) == {written, "dora_convert/receipt.json", "dora_convert/undo.safetensors"}
    merged = load_file(tmp_path / "out" / written)
    for key, x in exact(base, adapter).items():
        assert torch.equal(merged[key], rounded(x, torch.bfloat16)), key


def test_a_single_file_whose_config_must_change(tmp_path, base, adapter):
    """Its config is not written, so a merge that edits it is refused, with the folder to name."""
    single = make_base(tmp_path / "single", shards=1)
    with pytest.raises(UnsupportedError, match=r"changes config\.json") as caught:
        dora_convert.merge(single.path / "model.safetensors", adapter, tmp_path / "out", dtype="float32")
    assert str(single.path) in caught.value.hint


def test_a_file_that_is_no_weight_file(tmp_path, base, adapter):
    """Only weight files are read as such."""
    with pytest.raises(UnsupportedError, match="not a weight file"):
        dora_convert.merge(base.path / "config.json", adapter, tmp_path / "out")


def test_several_pickles_and_no_usual_name(tmp_path, base, adapter):
    """Which one is meant must be said; what trainers leave beside weights does not count."""
    as_pickles(base, 1)
    torch.save({}, base.path / "training_args.bin")
    (base.path / "pytorch_model.bin").rename(base.path / "a.bin")
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    torch.save(base.tensors, base.path / "b.pt")
    with pytest.raises(RefError, match="several models"):
        dora_convert.merge(base.path, adapter, tmp_path / "again")


def test_safetensors_win(tmp_path, base, adapter):
    """As in transformers; the pickles beside them are named as left behind."""
    torch.save({"x": torch.ones(3)}, base.path / "pytorch_model.bin")
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert report.left_behind == ("pytorch_model.bin",)


def test_a_base_without_config(tmp_path, base, adapter):
    """Names and shapes are enough."""
    (base.path / "config.json").unlink()
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()
    edit_json(adapter / "adapter_config.json", arrow_config={"top_k": 1})
    with pytest.raises(UnsupportedError):
        dora_convert.merge(base.path, adapter, tmp_path / "again")
