"""from-lora: what cannot be a DoRA is named, and what can be one is still made."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import DoraConvertError, NumericalError, OutputError, UnsupportedError

from . import peft_cases as tiny
from . import toy
from .commands import exit_code
from .peft_cases import SIGNAL, Case, adalora, bert, llama, lora, oracle, start
from .test_from_lora import BOUND, QV, TIED, apart, loaded, logits
from .test_peft_matrix import noisy

MIXED = {"target_modules": ["attn", "linear", "conv1"], "target_parameters": ["experts.up"]}


def test_what_cannot_be_dora_is_named(tmp_path):
    """Every module of MultiheadAttention and every parameter, in one error; nothing is written."""
    with noisy():
        oracle(Case(tiny.plain, lora(**MIXED), inputs=SIGNAL), "float32", tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        dora_convert.from_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert {fault.what for fault in caught.value.faults} == {
        "attn.weight", "attn.out_proj.weight", "experts.up",
    }  # fmt: skip
    assert "split=True" in caught.value.hint
    assert not list(tmp_path.glob("out*"))


def test_split_leaves_them_lora(tmp_path):
    """The DoRA in OUT and the LoRA in OUT/lora, loaded together by PEFT, do what the one LoRA did."""
    case = Case(tiny.plain, lora(**MIXED), inputs=SIGNAL)
    with noisy():
        oracle(case, "float32", tmp_path)
        report = dora_convert.from_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", split=True)
        before = PeftModel.from_pretrained(start(case, tmp_path / "base"), tmp_path / "adapter").eval()
        after = loaded(case, tmp_path, "out")
        alone = logits(after, case.inputs)
        after.load_adapter(tmp_path / "out/lora", "lora")
        after.base_model.set_adapter(["default", "lora"])
        want = logits(before, case.inputs)
        assert apart(logits(after.eval(), case.inputs), want) <= BOUND["float32"]
        assert apart(alone, want) > 1e-3
    assert set(report.to_dict()["left_as_lora"]) == {"attn.weight", "attn.out_proj.weight", "experts.up"}
    assert {module.name for module in report.modules} == {"linear.weight", "conv1.weight"}


REFUSED = {
    "lora_bias": (Case(bert("BertForMaskedLM"), lora(target_modules=QV, lora_bias=True)), "lora_bias"),
    "adalora": (Case(llama(), adalora(target_modules=["q_proj"])), "AdaLoRA"),
    "kasa": (Case(llama(), lora(kasa_config=KasaConfig())), "KaSA"),
    "dora already": (Case(llama(), lora(use_dora=True)), "DoRA already"),
    "tied on both sides": (
        Case(TIED, lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)), "embed_tokens",
    ),
    "block-diagonal": (
        Case(llama(), lora(target_modules=["q_proj"], use_bdlora=BdLoraConfig(None, ["q_proj"], nblocks=2))),
        "use_bdlora",
    ),
    "alora": (
        Case(llama(), lora(), edit=tiny.fields(alora_invocation_tokens=[1, 2])), "alora_invocation_tokens",
    ),
    "malformed": (Case(llama(), lora(), edit=tiny.renamed(lost="layers.1.mlp.down_proj.lora_B")), "lora_B"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path, name):
    """One error that says what it is; nothing is written."""
    case, word = REFUSED[name]
    with noisy():
        oracle(case, "float32", tmp_path)
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.from_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert word in caught.value.text()
    assert not list(tmp_path.glob("out*"))


def test_a_zero_output_is_refused(tmp_path):
    """If W + sBA has a row of zeros, m/‖V‖ is 0/0: the error names the module, and OUT does not exist."""
    base = toy.make_base(tmp_path / "base", torch.float32, shards=1)
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False, targets=["k_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    tensors[key][3] = 0
    save_file(tensors, adapter / "adapter_model.safetensors")
    weights = dict(base.tensors)
    weights["model.layers.1.self_attn.k_proj.weight"][3] = 0
    save_file(weights, base.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match=r"layers.1.self_attn.k_proj.* 1 outputs"):
        dora_convert.from_lora(base.path, adapter, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("alpha", [1e200, 1e308])
def test_a_scaling_beyond_all_numbers_is_refused(tmp_path, alpha):
    """A scaling whose square overflows is an error in one sentence, not a traceback."""
    base = toy.make_base(tmp_path / "base")
    adapter = toy.make_adapter(tmp_path / "adapter", base, dora=False)
    toy.edit_json(adapter / "adapter_config.json", lora_alpha=alpha)
    for verb, options in ((dora_convert.from_lora, {}), (dora_convert.to_lora, {"rank": 2})):
        with pytest.raises(NumericalError):
            verb(base.path, adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_include_and_exclude(tmp_path, base):
    """An excluded module is in neither adapter, and PEFT's config does not name it."""
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False)
    report = dora_convert.from_lora(base.path, adapter, tmp_path / "out", exclude=["*.mlp.*"])
    assert {module.name.rpartition(".")[0][-6:] for module in report.modules} == {"k_proj"}
    assert all("k_proj" in name for name in load_file(tmp_path / "out/adapter_model.safetensors"))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.{n}.self_attn.k_proj" for n in (0, 1)]


def test_names_that_end_alike(tmp_path):
    """An excluded module has no factors in PEFT either, though its name ends like that of a module with factors."""
    torch.manual_seed(3)
    tensors = {"linear.weight": torch.randn(9, 7), "block.linear.weight": torch.randn(11, 9)}
    (tmp_path / "base").mkdir()
    toy.write_shards(tmp_path / "base", tensors, 1)
    base = toy.Base(tmp_path / "base", tensors)
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False, targets=["linear"])
    dora_convert.from_lora(base.path, adapter, tmp_path / "out", exclude=["block.linear"])
    dora_convert.to_lora(base.path, adapter, tmp_path / "small", rank=1, exclude=["block.linear"])
    for made in ("out", "small"):
        config = json.loads((tmp_path / made / "adapter_config.json").read_text())
        assert config["target_modules"] == "linear"  # a pattern for the whole name


def test_command_line(tmp_path, base, capsys):
    """The answer on stdout in its three forms; usage errors are exit 2, and say what to do."""
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False)
    assert exit_code("from-lora", base.path, adapter, tmp_path / "out", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["command"], report["format"], report["schema"]) == ("from-lora", "peft", 1)
    assert report["modules"][0].keys() == {"name", "rank", "relative_error"}
    assert exit_code("from-lora", base.path, adapter, tmp_path / "out", "-q") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert exit_code("from-lora", base.path, adapter, tmp_path / "out", "-q", "--overwrite") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert exit_code("from-lora", base.path, adapter, tmp_path / "dry", "--dry-run") == 0
    assert "6 modules; nothing was written" in capsys.readouterr().out
    assert exit_code("from-lora", adapter, base.path, tmp_path / "swapped") == 2
    assert f"dora-convert from-lora {base.path} {adapter}" in capsys.readouterr().err
    assert exit_code("from-lora", base.path, adapter, tmp_path / "x", "--format", "pert") == 2
    assert "peft" in capsys.readouterr().err
    assert exit_code("from-lora", base.path, adapter, adapter / "inside") == 2
    assert "overlaps" in capsys.readouterr().err
    assert exit_code("from-lora", adapter) == 2
    toy.edit_json(adapter / "adapter_config.json", base_model_name_or_path="nowhere")
    assert exit_code("from-lora", adapter, tmp_path / "x") == 2
    assert "dora-convert from-lora BASE" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "lora"}


def test_a_killed_run_goes_on(tmp_path, base, monkeypatch):
    """Work in the journal is not done again; another command does not mix its results in."""
    from dora_convert.fitting import magnitudes
    from dora_convert.storage import journal

    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False)
    dora_convert.from_lora(base.path, adapter, tmp_path / "whole")
    honest, calls = magnitudes.magnitudes, []

    def fails(job, buffers, **options):
        calls.append(job.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return honest(job, buffers, **options)

    monkeypatch.setattr(magnitudes, "magnitudes", fails)
    monkeypatch.setattr(journal, "BATCH_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        dora_convert.from_lora(base.path, adapter, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="something else"):
        dora_convert.from_lora(base.path, adapter, tmp_path / "out", init="pretrained")
    report = dora_convert.from_lora(base.path, adapter, tmp_path / "out", workers=1)
    assert report.resumed
    assert len(calls) == 4 + 3
    assert toy.contents(tmp_path / "out") == toy.contents(tmp_path / "whole")
