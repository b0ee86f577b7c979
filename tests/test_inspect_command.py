"""The command line of inspect: tables, JSON, errors, and nothing heavy or changed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

from .toy import contents, make_adapter, make_base, write_shards

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
        ([tmp_path / "empty"], "is empty"),
        ([many], "these folders inside it do: style"),
        ([torn], "truncated or has trailing bytes"),
        ([tmp_path / "torn"], "truncated or has trailing bytes"),
        ([bad], "lora_alpha: expected"),
        ([tmp_path / "none"], "does not exist"),
        ([adapter / "notes.txt"], "not a weight file"),
        ([adapter, "--base", tmp_path / "empty"], "is empty"),
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
def test_nothing_heavy_is_imported(tmp_path, base, words):
    """Looking at headers does without torch; only magnitudes are compared with the base's values."""
    adapter = make_adapter(tmp_path / "lora", base, dora=False)
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
