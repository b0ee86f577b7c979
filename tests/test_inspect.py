"""The answers of inspect about adapters and checkpoints, from headers alone."""

from __future__ import annotations

import pytest
import torch

import dora_convert

from .toy import HIDDEN, edit_json, make_base, write_json, write_shards

DOWN = "model.layers.0.mlp.down_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def modules(report):
    return {module.target: module for module in report.modules}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_sharded(base):
    """A sharded checkpoint: architecture, numbers, shards, index, what lies beside it."""
    (base.path / "pytorch_model.bin").write_bytes(b"stale")
    report = dora_convert.inspect(base.path)
    assert isinstance(report, dora_convert.CheckpointReport)
    assert (report.kind, report.format) == ("checkpoint", "safetensors")
    assert (report.architectures, report.model_type) == (("LlamaForCausalLM",), "llama")
    count = sum(tensor.numel() for tensor in base.tensors.values())
    assert (report.tensors, report.parameters, report.bytes) == (13, count, 2 * count)
    assert report.dtypes == {"BF16": {"tensors": 13, "parameters": count, "bytes": 2 * count}}
    assert report.index == "model.safetensors.index.json"
    assert [shard["tensors"] for shard in report.shards] == [7, 6]
    assert report.left_behind == ("pytorch_model.bin",)
    assert "config.json" in report.side_files
    assert report.tied is report.quantised is None
    assert report.merges == ()
    kinds = {found["kind"]: found for found in report.weights}
    assert kinds["model.layers.*.mlp.up_proj.weight"] == {
        "kind": "model.layers.*.mlp.up_proj.weight", "dtype": "BF16", "shape": (96, 40), "tensors": 2,
    }  # fmt: skip


def test_single_file(tmp_path):
    """A folder with one file, and the file itself."""
    base = make_base(tmp_path / "one", shards=1)
    for ref in (base.path, base.path / "model.safetensors"):
        report = dora_convert.inspect(ref)
        assert report.index is None
        assert [shard["file"] for shard in report.shards] == ["model.safetensors"]
        assert report.architectures == ("LlamaForCausalLM",)


def test_pickled_and_tied(tmp_path, base):
    """A torch pickle whose embedding and head share bytes: those count once."""
    folder = tmp_path / "old"
    folder.mkdir()
    tensors = dict(base.tensors)
    tensors[HEAD] = tensors[EMBEDDING]
    torch.save(tensors, folder / "pytorch_model.bin")
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    report = dora_convert.inspect(folder)
    assert report.format == "torch pickle"
    assert report.tied == {"embedding": EMBEDDING, "head": HEAD, "head_stored": True}
    distinct = sum(tensor.numel() for name, tensor in tensors.items() if name != HEAD)
    assert (report.tensors, report.parameters) == (13, distinct)


def test_tied_without_a_head(run, base):
    """A head that is not on disk is named."""
    tensors = {name: tensor for name, tensor in base.tensors.items() if name != HEAD}
    write_shards(base.path, tensors, 2)
    edit_json(base.path / "config.json", tie_word_embeddings=True)
    assert dora_convert.inspect(base.path).tied == {"embedding": EMBEDDING, "head": HEAD, "head_stored": False}
    assert f"tied: {HEAD} is {EMBEDDING}, stored once" in run("inspect", base.path)[1]


@pytest.mark.parametrize(
    ("config", "method", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq", 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes", 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8),
        ({}, "unknown", None),
    ],
)
def test_quantised(run, base, config, method, bits):
    """The quantisation of a checkpoint is read from its config, nested ones included."""
    edit_json(base.path / "config.json", text_config={"quantization_config": config})
    report = dora_convert.inspect(base.path)
    assert report.quantised == {"method": method, "bits": bits, "tensor": None}
    assert f"quantised: {method}" in run("inspect", base.path)[1]


def test_quantised_without_saying(base):
    """Weights that look quantised where the config does not say so: which one, as a note."""
    tensors = base.tensors | {DOWN: torch.zeros(HIDDEN, 96, dtype=torch.float8_e4m3fn)}
    write_shards(base.path, tensors, 2)
    report = dora_convert.inspect(base.path)
    assert report.quantised == {"method": "unknown", "bits": None, "tensor": DOWN}
    assert report.notes == (f"{DOWN} looks quantised, but config.json does not say so",)
    assert report.dtypes["F8_E4M3"]["bytes"] == HIDDEN * 96


def test_merged(run, tmp_path, base, adapter):
    """An earlier merge's receipt: what was merged, how it can be undone; of merges on merges, each."""
    dora_convert.merge(base.path, adapter, tmp_path / "once")
    dora_convert.merge(tmp_path / "once", adapter, tmp_path / "twice", weight=[0.5], undo="none")
    last, first = dora_convert.inspect(tmp_path / "twice").merges
    assert (last["verb"], last["undo"], last["base"]["name"]) == ("merge", "none", "once")
    assert (first["undo"], first["tensors"]) == ("norms", {"merged": 6})
    assert first["versions"]["dora_convert"] == dora_convert.__version__
    assert [(found["name"], found["kind"], found["weight"]) for found in last["adapters"]] == [("adapter", "DoRA", 0.5)]
    out = run("inspect", tmp_path / "twice")[1]
    assert "adapter (DoRA, weight 0.5) into once; undo none" in out
    assert "adapter (DoRA) into base; undo norms" in out


def test_damaged_receipt(run, tmp_path, base):
    """A receipt that cannot be read hides nothing else; nor does one of another shape."""
    (base.path / "dora_convert").mkdir()
    receipt = base.path / "dora_convert/receipt.json"
    receipt.write_text("{")
    report = dora_convert.inspect(base.path)
    assert "cannot be read as JSON" in report.merges[0]["error"]
    assert "cannot be read as JSON" in run("inspect", base.path)[1]
    receipt.write_text('{"adapters": [1], "versions": [], "options": 3, "tensors": {"a": null}}')
    assert run("inspect", base.path)[0] == 0


def test_bases_without_config(base):
    """A checkpoint without config.json is one, with a note."""
    (base.path / "config.json").unlink()
    report = dora_convert.inspect(base.path)
    assert (report.architectures, report.model_type) == ((), None)
    assert "config.json not found" in report.notes[0]


def test_an_empty_index(run, base):
    """An index that names nothing makes a checkpoint of nothing."""
    write_json(base.path / "model.safetensors.index.json", {"weight_map": {}})
    code, out, _ = run("inspect", base.path)
    assert code == 0
    assert "0 tensors" in out


def test_a_lone_adapter_file(tmp_path, adapter):
    """An adapter's tensors without its config: said so."""
    (adapter / "adapter_config.json").unlink()
    report = dora_convert.inspect(adapter / "adapter_model.safetensors")
    assert (report.kind, report.maker) == ("adapter", "PEFT without adapter_config.json")
