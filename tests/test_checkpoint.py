"""Opening bases: which files count, and what is said of folders that are not what they should be."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import DoraConvertError, MalformedError, RefError
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.filenames import is_side_file, is_weight_file
from dora_convert.storage.json_files import read_config
from dora_convert.storage.refs import local_source

from .toy import edit_json, make_base, write_json, write_shards


def opened(path):
    return open_checkpoint(local_source(path))


def test_the_index_decides(base):
    """Stale shards beside the index do not count, and are named."""
    save_file({"stale": torch.ones(3)}, base.path / "model-00003-of-00003.safetensors")
    checkpoint = opened(base.path)
    assert checkpoint.tensors.keys() == base.tensors.keys()
    assert checkpoint.left_behind == ("model-00003-of-00003.safetensors",)


def test_a_single_file_wins_over_an_index(base):
    """As in transformers' loader."""
    save_file({"only": torch.ones(3)}, base.path / "model.safetensors")
    assert list(opened(base.path).tensors) == ["only"]


def test_a_lone_safetensors_file_of_any_name(tmp_path):
    """A folder may hold one file of another name, and no config."""
    save_file({"w": torch.ones(3)}, tmp_path / "diffusion_pytorch_model.safetensors")
    checkpoint = opened(tmp_path)
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.config is None


def test_tensors_missing_from_the_index(base):
    """A tensor in a shard that the index forgot is kept, with a note; a duplicate is where the index says."""
    index = base.path / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(table.values()))
    forgotten, doubled = (next(name for name, file in table.items() if file == shards[k]) for k in (0, 1))
    first = load_file(base.path / shards[0]) | {doubled: torch.zeros(3)}
    save_file(first, base.path / shards[0])
    del table[forgotten]
    write_json(index, {"weight_map": table})
    checkpoint = opened(base.path)
    assert forgotten in checkpoint.tensors
    assert any(forgotten in note for note in checkpoint.notes)
    assert checkpoint.tensors[doubled].path.name == shards[1]
    assert any(f"not read from {shards[0]}" in note and doubled in note for note in checkpoint.notes)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b"])
def test_index_must_stay_in_the_folder(base, name):
    """File names in an index are plain names."""
    edit_json(base.path / "model.safetensors.index.json", weight_map={"x": name})
    with pytest.raises(MalformedError, match="not a plain file name"):
        opened(base.path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "nonsense"])
def test_malformed_index(base, content):
    """An index that is not one."""
    (base.path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(MalformedError):
        opened(base.path)


def test_missing_shards_are_all_named(base):
    """Every file that the index names and that is not there."""
    for path in base.path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(RefError) as caught:
        opened(base.path)
    assert len(caught.value.faults) == 2


def test_index_that_names_absent_tensors(base):
    """A tensor that the index places in a shard without it."""
    index = base.path / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    write_json(index, {"weight_map": table | {"ghost": next(iter(table.values()))}})
    with pytest.raises(MalformedError) as caught:
        opened(base.path)
    assert caught.value.faults[0].what == "ghost"


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ([], RefError, "is empty"),
        (["config.json"], RefError, "no safetensors weights"),
        (["pytorch_model.bin"], MalformedError, "pytorch_model.bin"),
        (["training_args.bin"], RefError, "no safetensors weights"),
        (["model.gguf"], MalformedError, "not a valid GGUF file"),
        (["a.safetensors", "b.safetensors"], RefError, "several models"),
        (["model-00001-of-00002.safetensors"], RefError, r"index\.json"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], RefError, r"index\.json"),
        (["pytorch_model-00002-of-00002.bin"], RefError, r"index\.json"),
        (["model-00001-of-00001.safetensors"], MalformedError, "not a safetensors file"),
    ],
)
def test_folders_without_a_model(tmp_path, files, error, message):
    """The error names the files that the folder holds instead."""
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(error, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("config", ["[]", "{", "3", "\x00"])
def test_malformed_config(base, config):
    """config.json must be a JSON object."""
    (base.path / "config.json").write_text(config)
    with pytest.raises(MalformedError, match=r"config\.json"):
        opened(base.path)


@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_calls_dense_weights_quantised(base, adapter, tmp_path, nested):
    """The weights decide: the merge is made, and a warning has the method's name."""
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    edit_json(base.path / "config.json", **({"text_config": quantised} if nested else quantised))
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert any("quantised (fp8), but its weights are dense" in warning for warning in report.warnings)


def test_quantised_weights_without_a_config(base, adapter, tmp_path):
    """An fp8 weight is recognised by its dtype."""
    (base.path / "config.json").unlink()
    name = "model.layers.0.mlp.up_proj.weight"
    write_shards(base.path, base.tensors | {name: base.tensors[name].to(torch.float8_e4m3fn)}, 2)
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "F8_E4M3" in caught.value.text()


@pytest.mark.parametrize(
    ("name", "weight", "side"),
    [
        ("config.json", False, True),
        ("tokenizer.json", False, True),
        ("modeling_x.py", False, True),
        ("1_Pooling/config.json", False, True),
        ("README.md", False, False),
        (".gitattributes", False, False),
        (".cache/huggingface/x", False, False),
        ("dora_convert/receipt.json", False, False),
        ("model.safetensors", True, False),
        ("model.safetensors.index.json", True, False),
        ("pytorch_model.bin.index.json", True, False),
        ("consolidated.00.pth", True, False),
        ("original/params.json", True, False),
        ("onnx/model.onnx_data", True, False),
        ("optimizer.pt", True, False),
        ("spk_dict.pt", False, True),
        ("adapter_config.json", False, False),
    ],
)
def test_what_is_copied(name, weight, side):
    """Side files, weights, and what belongs to neither."""
    assert is_weight_file(name) == weight
    assert is_side_file(name) == side


def test_header_order_is_byte_order(tmp_path):
    """Tensors come in the order of their bytes, whatever the order in the header."""
    base = make_base(tmp_path / "base", shards=1)
    starts = [tensor.start for tensor in opened(base.path).shards[0].tensors]
    assert starts == sorted(starts)


def test_layers_may_be_counted_for_each_part(tmp_path):
    """LXMERT's config has a number of layers for each of its parts."""
    config = {"num_hidden_layers": {"vision": 5, "cross_encoder": 5, "language": 9}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == config
