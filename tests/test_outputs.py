"""verify --level outputs: base + adapter as PEFT runs them against merged models, right ones and wrong ones."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import DoraConvertError, UsageError
from dora_convert.outputs.halfulp import half_ulp
from dora_convert.outputs.models import Loader

from . import toy
from .test_cli import run  # noqa: F401 - a fixture
from .test_page import read
from .toy import edit_json, make_adapter, make_base

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WORDS = 131
BERT = {
    "vocab_size": WORDS, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


def llama(**fields):
    sizes = {"hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, **{**sizes, **fields})
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=24, n_layer=2, n_head=2, n_positions=64, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def t5():
    sizes = {"d_model": 24, "d_kv": 10, "d_ff": 56, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=WORDS, decoder_start_token_id=0, **sizes)
    )


def classifier():
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **BERT))


def encoder():
    return transformers.BertModel(transformers.BertConfig(**BERT))


FAMILIES = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM", True),
    "gpt2": (gpt2, ["c_attn", "c_fc"], "CAUSAL_LM", True),
    "t5": (t5, ["q", "v", "wo"], "SEQ_2_SEQ_LM", True),
    "classifier": (classifier, ["query", "value", "intermediate.dense"], "SEQ_CLS", False),
    "encoder": (encoder, ["query", "value"], None, False),
}


def trained(tmp_path, family="llama", dtype=BF16, *, dora=True, name="adapter", seed=0, **config):
    """A base and an adapter that looks trained: no B is zero and no magnitude a norm."""
    make, targets, task, _ = FAMILIES[family]
    torch.manual_seed(5)
    model = make()
    for value in model.parameters():
        value.data.mul_(4 if value.ndim > 1 and family != "t5" else 1)
    model = model.to(dtype)
    base = tmp_path / "base"
    if not base.exists():
        model.save_pretrained(base)
    torch.manual_seed(seed)
    given = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": targets,
        "use_dora": dora,
        "task_type": task,
        **config,
    }
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**given))
    for key, value in wrapped.named_parameters():
        if "lora_B" in key or "embedding_B" in key:
            value.data.normal_(0, 0.1)
        elif "magnitude" in key:
            value.data.mul_(1 + 0.1 * torch.randn_like(value))
        elif "modules_to_save" in key:
            value.data.add_(0.1 * torch.randn_like(value))
    wrapped.save_pretrained(tmp_path / name)
    return base, tmp_path / name


def merged(tmp_path, family="llama", dtype=BF16, **options):
    base, adapter = trained(tmp_path, family, dtype, **options)
    dora_convert.merge(base, adapter, tmp_path / "out")
    return base, adapter, tmp_path / "out"


def outputs(base, adapters, out, **options):
    return dora_convert.verify(base, adapters, out, level="outputs", **options)


def changed(adapter, to, tensors=None, **fields):
    """A copy of an adapter with some tensors and config fields changed."""
    shutil.copytree(adapter, to)
    edit_json(to / CONFIG, **fields)
    save_file((tensors or dict)(load_file(to / TENSORS)), to / TENSORS, {"format": "pt"})
    return to


def without_magnitudes(tensors):
    return {name: tensor for name, tensor in tensors.items() if "magnitude" not in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_right_and_wrong_merges(tmp_path, family):
    """A true merge agrees, with errors like the floor; a wrong scaling, and a DoRA merged as plain LoRA, do not."""
    generates = FAMILIES[family][3]
    base, adapter, out = merged(tmp_path, family)
    report = outputs(base, adapter, out)
    assert (report.verdict, report.problems) == ("agree", ())
    assert (
        0.2 < report.mean_abs_logit_error / report.mean_rounding_floor < (1.6 if report.positions > 30 else 4)
    )
    assert report.architecture == json.loads((base / "config.json").read_text())["architectures"][0]
    assert (report.greedy_agreement is not None) == generates
    assert report.prompts == 8
    for wrong in (
        changed(adapter, tmp_path / "scaled", lora_alpha=12),
        changed(adapter, tmp_path / "plain", without_magnitudes, use_dora=False),
    ):
        dora_convert.merge(base, wrong, tmp_path / f"{wrong.name}-out")
        report = outputs(base, adapter, tmp_path / f"{wrong.name}-out")
        assert report.verdict == "differ"
        assert "rounding alone leaves" in report.problems[0]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("dora", [True, False])
def test_pefts_merges_agree(tmp_path, dtype, dora):
    """Merged by PEFT, safe and unsafe, in any dtype; with one module left out they differ."""
    base, adapter = trained(tmp_path, "llama", dtype, dora=dora)
    for safe in (True, False):
        model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=dtype)
        PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=safe).save_pretrained(
            tmp_path / "out"
        )
        assert outputs(base, adapter, tmp_path / "out").verdict == "agree"
    dora_convert.merge(base, adapter, tmp_path / "part", exclude=["*.layers.1.mlp.down_proj"])
    edit_json(
        tmp_path / "part" / "dora_convert" / "receipt.json", verb="?"
    )  # which would say what was left out
    assert outputs(base, adapter, tmp_path / "part").verdict == "differ"


def test_figures_are_those_of_the_models(tmp_path):
    """Error, divergence and agreement as PEFT and transformers give them; the floor as real rounding leaves it."""
    from dora_convert.outputs.samples import make_samples

    base, adapter, out = merged(tmp_path)
    report = outputs(base, adapter, out)
    config = transformers.AutoConfig.from_pretrained(base)
    (batch,) = make_samples((), [], "LlamaForCausalLM", config).batches
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=FP32)
    reference = PeftModel.from_pretrained(model, adapter).eval()
    ids = reference.generate(
        input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids), max_new_tokens=8, min_new_tokens=8,
        do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    with torch.no_grad():
        one = reference(input_ids=ids).logits.double()
        two = transformers.LlamaForCausalLM.from_pretrained(out, dtype=FP32)(input_ids=ids).logits.double()
        best = reference.merge_and_unload()
        for name, value in best.named_parameters():
            if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
                value.copy_(value.to(BF16))
        left = best(input_ids=ids).logits.double() - one
    assert report.positions == ids.numel()
    assert report.max_abs_logit_error == pytest.approx(float((one - two).abs().max()), rel=1e-2)
    assert report.mean_abs_logit_error == pytest.approx(float((one - two).abs().mean()), rel=1e-2)
    p, q = one.log_softmax(-1), two.log_softmax(-1)
    assert report.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=2e-2)
    assert report.top1_agreement == float((one.argmax(-1) == two.argmax(-1)).double().mean())
    same = two[:, -9:-1].argmax(-1) == ids[:, -8:]
    assert report.greedy_agreement == float(same.all(1).double().mean())
    assert report.mean_rounding_floor == pytest.approx(float(left.abs().mean()), rel=0.4)
    assert report.rounding_floor == pytest.approx(float(left.abs().max()), rel=1)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_half_ulp(dtype):
    """Half the distance to the next number of the dtype."""
    x = torch.randn(300, dtype=FP32).mul(torch.logspace(-3, 3, 300)).to(dtype)
    above = (x.abs().view(torch.int16) + 1).view(dtype)
    assert torch.equal(half_ulp(x.float(), dtype), (above.float() - x.abs().float()) / 2)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"target_modules": ["embed_tokens", "o_proj", "lm_head"], "dora": False}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("gpt2", {}),
        ("t5", {}),
        ("classifier", {}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_offloaded_is_the_same(tmp_path, family, options):
    """Where memory does not hold a whole model, its blocks are read one by one, and every figure is as before."""
    base, adapter, out = merged(tmp_path, family, **options)
    whole = outputs(base, adapter, out)
    notices = []
    part = outputs(base, adapter, out, max_memory=whole.memory_bytes - 1, on_notice=notices.append)
    assert (whole.offloaded, part.offloaded, part.verdict) == (False, True, "agree")
    assert part.memory_bytes < whole.memory_bytes
    assert any("block by block" in text for text in notices)
    figures = (
        "max_abs_logit_error",
        "mean_abs_logit_error",
        "mean_rounding_floor",
        "mean_kl",
        "top1_agreement",
    )
    for name in figures:
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=1e-3), name
    wrong = changed(adapter, tmp_path / "scaled", lora_alpha=15)
    dora_convert.merge(base, wrong, tmp_path / "wrong")
    assert outputs(base, adapter, tmp_path / "wrong", max_memory=whole.memory_bytes - 1).verdict == "differ"


def test_too_little_memory(tmp_path, monkeypatch):
    """A limit below the largest module is refused, with the least that will do, before a model is loaded."""
    base, adapter, out = merged(tmp_path)
    with monkeypatch.context() as patch:
        patch.delattr(Loader, "_load")
        with pytest.raises(UsageError, match="largest module") as caught:
            outputs(base, adapter, out, max_memory="9KB")
    least = caught.value.hint.split()[1]
    assert outputs(base, adapter, out, max_memory=least).verdict == "agree"


def test_several_adapters(tmp_path):
    """Plain LoRAs add up, as PEFT has them active together; what was never trained together is undecidable."""
    base, first = trained(tmp_path, dora=False)
    _, second = trained(
        tmp_path, dora=False, name="second", seed=1, target_modules=["q_proj", "up_proj"], r=5
    )
    _, third = trained(tmp_path, name="third", seed=2)
    dora_convert.merge(base, [first, second], tmp_path / "out")
    assert outputs(base, [first, second], tmp_path / "out").verdict == "agree"
    assert outputs(base, first, tmp_path / "out").verdict == "differ"
    for adapters, options, words in (
        ([first, third], {}, "not trained together"),
        ([first, second], {"weight": [1, 0.5]}, "another --weight"),
        ([first], {"exclude": ["*.q_proj"]}, "whole adapters"),
    ):
        with pytest.raises(DoraConvertError, match=words) as caught:
            outputs(base, adapters, tmp_path / "out", **options)
        assert caught.value.exit_code == 2


def test_what_cannot_be_run(tmp_path, monkeypatch):
    """Adapters that PEFT does not load and models that transformers does not know are undecidable, with the reason."""
    base, adapter, out = merged(tmp_path, dora=False)
    monkeypatch.setattr(
        "peft.PeftModel.from_pretrained", lambda *_, **__: (_ for _ in ()).throw(ValueError("no\nway"))
    )
    with pytest.raises(DoraConvertError, match=r"cannot load adapter \(ValueError: no way\)"):
        outputs(base, adapter, out)
    toy.write_json(base / "config.json", {"architectures": ["ViTModel"], "model_type": "vit"})
    with pytest.raises(DoraConvertError, match="not asked with text"):
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


def test_prompts(tmp_path, run):  # noqa: F811
    """Texts from options and a file, through the tokenizer beside the base; without one they are refused."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    base, adapter, out = merged(tmp_path)
    file = tmp_path / "prompts.txt"
    file.write_text("one two\n\nthree four five\n")
    words = "verify", base, adapter, out, "--level", "outputs", "--prompt", "two one six", "--prompts", file
    code, _, err = run(*words)
    assert code == 2
    assert "no tokenizer" in err
    table = {word: number for number, word in enumerate(["?", "one", "two", "three", "four", "five", "six"])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(base / "tokenizer.json"))
    toy.write_json(base / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    code, text, _ = run(*words, "--json")
    report = json.loads(text)
    assert (code, report["prompts"], report["positions"]) == (0, 3, 2 + 3 + 3 + 3 * 8)
    assert run("verify", base, adapter, out, "--prompt", "x")[0] == 2
    for bad in (tmp_path / "none.txt", tmp_path):
        assert run(*words[:-1], bad)[0] == 2
    file.write_text("\n \n")
    assert "holds no prompt" in run(*words)[2]


def test_command_line(tmp_path, run):  # noqa: F811
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
    code, text, _ = run(
        *words[:3], tmp_path / "bad", *words[4:], "--json", "--device", "cpu", "--report", page
    )
    report = json.loads(text)
    assert (code, report["verdict"], report["level"]) == (1, "differ", "outputs")
    assert report["max_abs_logit_error"] > report["rounding_floor"] > 0
    assert {
        "prompts",
        "mean_kl",
        "top1_agreement",
        "schema",
        "command",
        "version",
        "seconds",
    } <= report.keys()
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


def test_merge_verifies_outputs(tmp_path, monkeypatch, run):  # noqa: F811
    """A merge whose outputs differ is not published, and what is done is kept: the same command goes on from there."""
    base, adapter = trained(tmp_path)
    words = "merge", base, adapter, tmp_path / "out", "--verify-outputs", "--json"
    with monkeypatch.context() as patch:
        patch.setattr("dora_convert.outputs.comparison.MEAN_MARGIN", 0.1)
        code, _, err = run(*words)
    assert code == 1
    assert '"verification"' in err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    code, text, _ = run(*words)
    report = json.loads(text)
    assert (code, report["resumed"], report["bytes_written"]) == (0, True, 0)
    assert (report["outputs"]["verdict"], report["outputs"]["prompts"]) == ("agree", 8)
    assert (
        dora_convert.merge(base, adapter, tmp_path / "again", verify_outputs=True).outputs["verdict"]
        == "agree"
    )
    assert dora_convert.merge(base, adapter, tmp_path / "other").outputs is None
    with pytest.raises(DoraConvertError, match="another --weight"):
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
    said = "as the receipt of MERGED says: --weight 0.5 --weight 1.5 --exclude *.layers.1.*"
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
