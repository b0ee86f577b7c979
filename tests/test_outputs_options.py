"""verify --level outputs: what cannot be run, prompts, the command line, and merge --verify-outputs."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dora_convert
from dora_convert.errors import DoraConvertError

from . import toy
from .test_outputs import changed, merged, outputs, trained
from .test_page import read
from .test_schema import faults, of
from .toy import edit_json, make_adapter, make_base


def test_what_cannot_be_run(tmp_path, monkeypatch):
    """Adapters that PEFT does not load and models that transformers does not know are undecidable, with the reason."""
    base, adapter, out = merged(tmp_path, dora=False)
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda *_, **__: (_ for _ in ()).throw(ValueError("no\nway")))
    with pytest.raises(DoraConvertError, match=r"cannot load adapter \(ValueError: no way\)"):
        outputs(base, adapter, out)
    toy.write_json(base / "config.json", {"architectures": ["ViTModel"], "model_type": "vit"})
    with pytest.raises(DoraConvertError, match="does not take text"):
        outputs(base, adapter, out)
    edit_json(base / "config.json", architectures=["NobodyForCausalLM"], model_type="nobody")
    with pytest.raises(DoraConvertError, match="does not know the model"):
        outputs(base, adapter, out)


def test_another_class_differs(tmp_path):
    """config.json naming another class is a difference that needs no run."""
    base, adapter, out = merged(tmp_path, dora=False)
    edit_json(out / "config.json", architectures=["LlamaModel"])
    report = outputs(base, adapter, out)
    assert report.problems == ("config.json names LlamaModel; it should be LlamaForCausalLM",)


def test_prompts(tmp_path, run):
    """Texts from options and a file, through the tokenizer beside the base; without one they are refused."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    base, adapter, out = merged(tmp_path)
    file = tmp_path / "prompts.txt"
    file.write_text("one two\n\nthree four five\n")
    words = "verify", base, adapter, out, "--level", "outputs", "--prompt", "two one six", "--prompts", file
    code, _, err = run(*words)
    assert code == 2
    assert "No tokenizer" in err
    table = {word: number for number, word in enumerate(["?", "one", "two", "three", "four", "five", "six"])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(base / "tokenizer.json"))
    toy.write_json(base / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    code, text, _ = run(*words, "--json")
    report = json.loads(text)
    assert list(faults(report, of("OutputsReport"))) == []
    assert (code, report["prompts"], report["positions"]) == (0, 3, 2 + 3 + 3 + 3 * 8)
    texts = report["continuations"]
    assert {each["prompt"] for each in texts} == {"one two", "three four five", "two one six"}
    assert all(each["reference"] == each["merged"] for each in texts)
    seen: list[tuple[int, int]] = []
    phases: list[str] = []
    page = tmp_path / "page.html"
    again = dora_convert.verify(
        base, adapter, out, level="outputs", prompts=file, report=page, on_progress=lambda *counts: seen.append(counts),
        on_notice=phases.append,
    )  # fmt: skip
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert {"outputs: base + adapter", "outputs: merged"} <= set(phases)
    assert "base + adapter" in str(again)
    assert "<h2>Continuations</h2>" in page.read_text(encoding="utf-8")
    assert run("verify", base, adapter, out, "--prompt", "x")[0] == 2
    for bad in (tmp_path / "none.txt", tmp_path):
        assert run(*words[:-1], bad)[0] == 2
    file.write_text("\n \n")
    assert "holds no prompt" in run(*words)[2]


def test_command_line(tmp_path, run):
    """Exit codes, the contract's fields, the table, and a page."""
    base, adapter, out = merged(tmp_path)
    page = tmp_path / "page.html"
    words = "verify", base, adapter, out, "--level", "outputs"
    code, text, err = run(*words, "--report", page)
    assert code == 0
    assert text.splitlines()[-1] == "verdict: agree"
    assert "mean KL" in text
    assert "LlamaForCausalLM on cpu, one model at a time, whole; about" in err
    assert read(page).count("span", **{"class": "agree"}) == 1
    dora_convert.merge(base, changed(adapter, tmp_path / "wrong", lora_alpha=15), tmp_path / "bad")
    code, text, _ = run(*words[:3], tmp_path / "bad", *words[4:], "--json", "--device", "cpu", "--report", page)
    report = json.loads(text)
    assert (code, report["verdict"], report["level"]) == (1, "differ", "outputs")
    assert report["max_abs_logit_error"] > report["rounding_floor"] > 0
    assert {"prompts", "mean_kl", "top1_agreement", "schema", "command", "version", "seconds"} <= report.keys()
    assert any(report["problems"][0][:40] in text for text in read(page).texts)
    code, _, err = run(*words, "--device", "cuda:7")
    assert (code, "usable CUDA devices" in err) == (2, True)


BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
from dora_convert.cli import main
main({words})
"""


@pytest.mark.parametrize("verb", ["verify", "merge"])
def test_missing_extras(tmp_path, base, adapter, verb):
    """Without transformers and PEFT: exit code 2, and the command that brings them; nothing is written."""
    out = str(tmp_path / "out")
    words = [
        verb,
        str(base.path),
        str(adapter),
        out,
        *(["--verify-outputs"] if verb == "merge" else ["--level", "outputs"]),
    ]
    code = BLOCK.format(blocked=("transformers", "peft"), words=words)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "transformers and peft, which are not installed" in found.stderr
    assert "pip install 'dora-convert[verify]'" in found.stderr
    assert not list(tmp_path.glob("out*"))


def test_merge_verifies_outputs(tmp_path, monkeypatch, run):
    """A merge whose outputs differ is not published, and what is done is kept: the same command goes on from there."""
    base, adapter = trained(tmp_path)
    words = "merge", base, adapter, tmp_path / "out", "--verify-outputs", "--json"
    with monkeypatch.context() as patch:
        patch.setattr("dora_convert.logits.compare.MEAN_MARGIN", 0.1)
        code, _, err = run(*words)
    assert code == 1
    assert '"verification"' in err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    code, text, _ = run(*words)
    report = json.loads(text)
    assert (code, report["resumed"], report["bytes_written"]) == (0, True, 0)
    assert (report["outputs"]["verdict"], report["outputs"]["prompts"]) == ("agree", 8)
    assert dora_convert.merge(base, adapter, tmp_path / "again", verify_outputs=True).outputs["verdict"] == "agree"
    assert dora_convert.merge(base, adapter, tmp_path / "other").outputs is None
    with pytest.raises(DoraConvertError, match="another weight="):
        dora_convert.merge(base, adapter, tmp_path / "half", weight=[0.5], verify_outputs=True)
    assert not list(tmp_path.glob("half*"))


def test_nothing_is_left_as_it_was_not(tmp_path):
    """Threads, random numbers, precision, default dtype and logging are the caller's again, of several threads, too."""
    base, adapter, out = merged(tmp_path, dora=False)
    torch.manual_seed(3)
    torch.set_float32_matmul_precision("medium")
    try:
        before = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().tolist()
        with ThreadPoolExecutor(3) as pool:
            reports = list(pool.map(lambda _: outputs(base, adapter, out), range(3)))
        assert {report.verdict for report in reports} == {"agree"}
        assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().tolist())
        assert logging.root.manager.disable == 0
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_options_of_the_receipt(tmp_path):
    """Weights and modules that are not given are those of MERGED's receipt; given ones win; of other adapters none."""
    base = make_base(tmp_path / "base")
    first = make_adapter(tmp_path / "first", base, dora=True)
    second = make_adapter(tmp_path / "second", base, dora=False, seed=3)
    out = tmp_path / "out"
    dora_convert.merge(base.path, [first, second], out, weight=[0.5, 1.5], exclude=["*.layers.1.*"])
    notices: list[str] = []
    found = dora_convert.verify(base.path, [first, second], out, on_notice=notices.append)
    assert found.verdict == "agree"
    said = "as the receipt of MERGED says: weight=0.5 weight=1.5 exclude='*.layers.1.*'"
    assert said in notices
    notices.clear()
    given = {"weight": [0.5, 1.5], "exclude": ["*.layers.1.*"], "on_notice": notices.append}
    assert dora_convert.verify(base.path, [first, second], out, **given).verdict == "agree"
    assert said not in notices
    assert dora_convert.verify(base.path, [first, second], out, weight=[0.5, 1.5]).verdict == "differ"
    assert dora_convert.verify(base.path, [second, first], out, on_notice=notices.append).verdict == "differ"
    assert said not in notices


def test_fields_of_the_receipt(tmp_path):
    """Fields that a merge was told to accept need not be named again."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False, brand_new_field=3)
    dora_convert.merge(base.path, adapter, tmp_path / "out", ignore_field=["brand_new_field"])
    assert dora_convert.verify(base.path, adapter, tmp_path / "out").verdict == "agree"
    shutil.rmtree(tmp_path / "out" / "dora_convert")
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.verify(base.path, adapter, tmp_path / "out")
    assert "brand_new_field" in caught.value.text()
