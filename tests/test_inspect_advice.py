"""inspect advises: what is unusual, which programs take an adapter or a checkpoint as it is, and what to do."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.verbs.inspect.loaders import FEATURES, LOADERS, REFUSES, WRONG

from .toy import edit_json, make_adapter, make_base

GOLDEN = Path(__file__).parent / "golden" / "formats"


def verdicts(report):
    return {each.loader: each.verdict for each in report.loaders}


def change(adapter, edit):
    """Write an adapter's tensors anew."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: edit(name, x).contiguous() for name, x in load_file(file).items()}, file, {"format": "pt"})


def test_the_table_is_whole():
    """Every rule asks for a feature that has words, and has a verdict, a reason and a source."""
    for loader in LOADERS:
        assert loader.source
        for rule in loader.rules:
            assert rule.feature in FEATURES
            assert rule.verdict in (REFUSES, WRONG)
            assert rule.why
            assert rule.source


def test_a_plain_lora_is_taken_everywhere(tmp_path, base):
    """Programs for language models that read PEFT's files."""
    report = dora_convert.inspect(make_adapter(tmp_path / "a", base, dora=False))
    assert verdicts(report) == {
        "PEFT": "yes", "vLLM": "yes", "SGLang": "yes", "llama.cpp": "yes", "MLX": "no", "diffusers": "no", "ComfyUI": "no",
    }  # fmt: skip
    assert report.unusual == ()
    assert report.facts["ranks"] == [4]
    assert report.facts["scalings"] == [1.5]
    assert report.facts["targets"] == ["down_proj", "k_proj", "up_proj"]
    assert (report.facts["kinds"], report.facts["axes"]) == (["LoRA"], [])


def test_a_dora_is_for_peft_alone_and_the_command_helps(tmp_path, base, adapter, monkeypatch):
    """What vLLM refuses becomes what vLLM takes, by the command that inspect names."""
    report = dora_convert.inspect(adapter, base=base.path)
    assert verdicts(report) | {"MLX": "no"} == {
        "PEFT": "yes", "vLLM": "no", "SGLang": "no", "llama.cpp": "no", "MLX": "no", "diffusers": "no", "ComfyUI": "no",
    }  # fmt: skip
    advice = next(each for each in report.loaders if each.loader == "vLLM")
    assert "DoRA" in advice.why
    assert advice.lossy
    assert "peft_helper.py" in advice.source
    assert report.facts["axes"] == ["rows"]
    program, verb, *words = shlex.split(advice.command)
    assert (program, verb, words[:2]) == ("dora-convert", "to-lora", [str(base.path), str(adapter)])
    monkeypatch.chdir(tmp_path)
    dora_convert.to_lora(words[0], words[1], words[2], rank=int(words[4]))
    assert verdicts(dora_convert.inspect("OUT"))["vLLM"] == "yes"


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ({"use_rslora": True}, {"SGLang", "llama.cpp"}),
        ({"alpha_pattern": {"k_proj": 3}}, {"vLLM", "SGLang", "llama.cpp"}),
        ({"init_lora_weights": "pissa"}, {"vLLM", "SGLang", "llama.cpp"}),
    ],
    ids=["rslora", "patterns", "pissa"],
)
def test_programs_that_load_something_else(tmp_path, base, config, wrong):
    """No error there, other weights: the verdict is not no."""
    report = dora_convert.inspect(make_adapter(tmp_path / "a", base, dora=False, **config))
    assert {name for name, verdict in verdicts(report).items() if verdict == "wrong"} == wrong
    assert all(each.command and not each.lossy for each in report.loaders if each.verdict == "wrong")


def test_modules_saved_whole_must_be_merged(tmp_path, base, run):
    """A head in modules_to_save: vLLM and llama.cpp refuse; the way out is a merge."""
    head = {"base_model.model.lm_head.weight": base.tensors["lm_head.weight"] * 2}
    adapter = make_adapter(tmp_path / "a", base, dora=False, extra=head, modules_to_save=["lm_head"])
    code, out, _ = run("inspect", adapter, "--base", base.path)
    assert code == 0
    assert f"for vLLM, SGLang, llama.cpp, MLX: dora-convert merge {base.path} {adapter} OUT" in out
    assert "modules_to_save must be empty" in out


def test_what_is_unusual(tmp_path, base):
    """Magnitudes that nobody announces or that are coarse, zeros, and ranks that vLLM wants to be told."""
    adapter = make_adapter(tmp_path / "a", base, dora=True)
    change(adapter, lambda _, x: x.bfloat16())
    assert any("0.4 %" in text for text in dora_convert.inspect(adapter).unusual)
    edit_json(adapter / "adapter_config.json", use_dora=False)
    report = dora_convert.inspect(adapter)
    assert report.faults
    zero = make_adapter(tmp_path / "zero", base, dora=False)
    change(zero, lambda name, x: x * ("lora_B" not in name))
    assert any("changes nothing" in text for text in dora_convert.inspect(zero).unusual)
    part = make_adapter(tmp_path / "part", base, dora=False)
    change(part, lambda name, x: x * ("lora_B" not in name or "layers.1" in name))
    assert any(text.startswith("3 of 6 lora_B are zero") for text in dora_convert.inspect(part).unusual)
    rows = make_adapter(tmp_path / "rows", base, dora=False)
    change(rows, lambda name, x: torch.cat([x[:5] * 0, x[5:]]) if "lora_B" in name and "k_proj" in name else x)
    assert any("2 lora_B have rows that are exactly zero" in text for text in dora_convert.inspect(rows).unusual)
    large = dora_convert.inspect(make_adapter(tmp_path / "large", base, dora=False, rank=20))
    assert next(each.why for each in large.loaders if each.loader == "vLLM") == "with --max-lora-rank 20"


def test_magnitudes_against_the_base(tmp_path, base, adapter):
    """Those of this base, normalised ones, and those of another base."""
    file = adapter / "adapter_model.safetensors"

    def warnings(factor):
        tensors = load_file(file)
        odd = {name: factor(x) if "magnitude" in name else x for name, x in tensors.items()}
        save_file(odd, file, {"format": "pt"})
        found = " ".join(dora_convert.inspect(adapter, base=base.path).landing.warnings)
        save_file(tensors, file, {"format": "pt"})
        return found

    assert warnings(lambda m: m) == ""
    assert "divided by their norms" in warnings(lambda m: 1 + 0.01 * torch.randn(m.shape))
    assert "another base?" in warnings(lambda m: m * 5)


def test_checkpoints(tmp_path, base, run):
    """A dense checkpoint, pickles, and one without a config; in words and in JSON."""
    report = dora_convert.inspect(base.path)
    assert set(verdicts(report)) == {"transformers", "vLLM", "SGLang", "llama.cpp", "MLX"}
    assert set(verdicts(report).values()) == {"yes"}
    assert report.dense_parameters == report.parameters
    code, out, _ = run("inspect", base.path, "--json")
    assert (code, {each["loader"] for each in json.loads(out)["loaders"]}) == (0, set(verdicts(report)))
    torch.save({"x.weight": torch.zeros(2, 3)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    assert verdicts(dora_convert.inspect(tmp_path))["MLX"] == "no"
    (tmp_path / "config.json").unlink()
    assert set(verdicts(dora_convert.inspect(tmp_path)).values()) == {"no"}


def test_quantised_checkpoints(tmp_path):
    """Weights are counted as they are when decoded, and MLX takes no fp8."""
    folder = tmp_path / "fp8"
    folder.mkdir()
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(128, 256).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 2),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], "quantization_config": config}))
    report = dora_convert.inspect(folder)
    assert report.dense_parameters == 128 * 256
    assert [count["tensors"] for count in report.coded.values()] == [1]
    assert verdicts(report)["vLLM"] == "yes"
    assert verdicts(report)["MLX"] == "no"


def test_no_torch(tmp_path):
    """Advice needs headers and bytes, not torch: inspect stays quick."""
    import subprocess
    import sys

    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base, dora=True)
    code = f"import sys, dora_convert; [dora_convert.inspect(x) for x in {[str(adapter), str(base.path)]}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_kinds_become_a_lora_or_a_model():
    """No command is named that refuses the adapter, and the adapter's own file is no model beside it."""
    report = dora_convert.inspect(GOLDEN / "lycoris-loha")
    commands = {each.command.split()[1] for each in report.loaders if each.command}
    assert commands <= {"merge", "to-lora"}
    assert commands
    assert not any("weights, too" in note for note in report.notes)
