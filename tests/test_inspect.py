"""What inspect says of adapters and checkpoints, from headers alone."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

import dora_convert

from .toy import (
    HIDDEN,
    contents,
    edit_json,
    make_adapter,
    make_base,
    write_json,
    write_shards,
)

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
    assert dora_convert.inspect(base.path).tied == {
        "embedding": EMBEDDING,
        "head": HEAD,
        "head_stored": False,
    }
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
    """How a checkpoint is quantised, from its config, nested ones included."""
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
    assert [(found["name"], found["kind"], found["weight"]) for found in last["adapters"]] == [
        ("adapter", "DoRA", 0.5)
    ]
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
    assert "no config.json" in report.notes[0]


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
    assert any("is an adapter's, but there is no adapter_config.json" in note for note in report.notes)


# --- the command line -------------------------------------------------------------------------------------------------


def test_adapter_table(run, base, adapter):
    """Layers are counted together, with what was decided in the last lines; -v lists each module."""
    code, out, err = run("inspect", adapter, "--base", base.path)
    assert (code, err) == (0, "")
    assert re.search(r"model\.layers\.\*\.mlp\.down_proj +2 +DoRA +4 +1\.5 +alpha 6 / rank", out)
    assert "merged: DoRA, rank 4, scaling 1.5" in out
    assert "adapter: adapter, DoRA in the peft format" in out
    assert f"fits {base.path}: 13 tensors, 6 merged, 0 replaced, 0 added, 7 copied" in out
    assert "model.layers.1.mlp.down_proj" in run("inspect", adapter, "-v")[1]


def test_checkpoint_table(run, base):
    """A checkpoint's tensors by kind; -v lists its shards."""
    code, out, err = run("inspect", base.path)
    assert (code, err) == (0, "")
    assert re.search(r"model\.layers\.\*\.mlp\.up_proj\.weight +2 +BF16 +96 × 40", out)
    assert "checkpoint: base, LlamaForCausalLM (llama)" in out
    assert "stored as safetensors: model.safetensors.index.json, 2 shards" in out
    assert "model-00001-of-00002.safetensors  7 tensors" in run("inspect", base.path, "-v")[1]


def test_misfit_is_an_answer(run, tmp_path, base, adapter):
    """Exit code 0; at most ten faults, all with -v and --json."""
    empty = make_base(tmp_path / "empty", layers=0)
    code, out, _ = run("inspect", adapter, "--base", empty.path)
    assert code == 0
    assert "does not fit" in out
    assert "… and 8 more" in out
    assert "more" not in run("inspect", adapter, "--base", empty.path, "-v")[1]
    landing = json.loads(run("inspect", adapter, "--base", empty.path, "--json")[1])["landing"]
    assert len(landing["faults"]) == 18
    assert {"what", "why"} == landing["faults"][0].keys()


def test_json(run, base, adapter):
    """--json: one document with the fields of the contract."""
    report = json.loads(run("inspect", adapter, "--base", base.path, "--json")[1])
    assert {
        "schema", "command", "version", "seconds", "kind", "format", "ref", "method", "base", "revision", "task", "tensors",
        "parameters", "bytes", "dtypes", "modules", "ignored", "faults", "refused", "landing", "notes",
    } <= report.keys()  # fmt: skip
    assert (report["schema"], report["command"], report["kind"]) == (1, "inspect", "adapter")
    assert {"target", "kind", "method", "rank", "scaling", "rule", "tensors"} <= report["modules"][0].keys()
    report = json.loads(run("inspect", base.path, "--json")[1])
    assert {
        "schema", "command", "version", "seconds", "kind", "format", "architectures", "model_type", "shards", "index",
        "tied", "quantised", "side_files", "left_behind", "merges", "weights",
    } <= report.keys()  # fmt: skip


def test_quiet(run, base, adapter):
    """--quiet: one line."""
    assert run("inspect", adapter, "-q") == (0, "adapter adapter\n", "")
    assert run("inspect", base.path, "-q") == (0, "checkpoint base\n", "")


def test_names_are_text(run, base):
    """Tensor names cannot colour the terminal, break its lines or be taken for rich's markup."""
    name = "model.[/red]\x1b[31m\nred"
    write_shards(base.path, base.tensors | {f"{name}.weight": torch.ones(3)}, 1)
    (base.path / "model.safetensors.index.json").unlink()
    code, out, err = run("inspect", base.path)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert r"model.[/red]\x1b[31m\nred.weight" in out


def test_errors(run, tmp_path, base, adapter):
    """Neither adapter nor checkpoint, a folder of adapters, and damage: exit code 2 and a clear message."""
    (tmp_path / "empty").mkdir()
    many = tmp_path / "many"
    many.mkdir()
    make_adapter(many / "style", base, dora=False)
    torn = make_base(tmp_path / "torn", shards=1).path / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    bad = make_adapter(tmp_path / "bad", base, dora=False, lora_alpha="16")
    (adapter / "notes.txt").write_text("x")
    for words, message in [
        ([tmp_path / "empty"], "holds no safetensors weights"),
        ([many], "these folders inside it do: style"),
        ([torn], "truncated or has trailing bytes"),
        ([tmp_path / "torn"], "truncated or has trailing bytes"),
        ([bad], "lora_alpha must be"),
        ([tmp_path / "none"], "does not exist"),
        ([adapter / "notes.txt"], "no weight file that is read"),
        ([adapter, "--base", tmp_path / "empty"], "holds no safetensors weights"),
    ]:
        code, out, err = run("inspect", *words)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
    assert json.loads(run("inspect", many, "--json")[2])["error"]["kind"] == "reference"


def test_base_for_a_checkpoint(run, base, adapter):
    """--base belongs to adapters; exchanged, the error has the command that was meant."""
    code, _, err = run("inspect", base.path, "--base", adapter)
    assert code == 2
    assert f"Hint: {shlex.join(['dora-convert', 'inspect', str(adapter), '--base', str(base.path)])}\n" in err


@pytest.mark.parametrize("words", [["{adapter}", "--base", "{base}"], ["{base}", "--json"], ["-h"]])
def test_nothing_heavy_is_imported(base, adapter, words):
    """Looking at headers does without torch."""
    command = ["inspect", *(word.format(base=base.path, adapter=adapter) for word in words)]
    code = f"""
import sys
from dora_convert.cli import main
try:
    main({command})
except SystemExit as left:
    assert not left.code, left.code
heavy = {{"torch", "safetensors", "huggingface_hub", "transformers", "peft", "numpy"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_inspecting_changes_nothing(run, tmp_path, base, adapter):
    """No file is written, neither beside the inputs nor in them."""
    before = contents(tmp_path)
    run("inspect", adapter, "--base", base.path)
    run("inspect", base.path)
    assert contents(tmp_path) == before
