"""verify --level outputs: base + adapter as PEFT runs them against merged models, right ones and wrong ones."""

from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import DoraConvertError, UsageError
from dora_convert.logits.models import ModelLoader
from dora_convert.logits.rounding_floor import half_ulp

from .toy import edit_json

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
    config = transformers.GPT2Config(vocab_size=WORDS, n_embd=24, n_layer=2, n_head=2, n_positions=64, eos_token_id=2)
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
    given = {"r": 3, "lora_alpha": 6, "target_modules": targets, "use_dora": dora, "task_type": task, **config}
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
    assert 0.2 < report.mean_abs_logit_error / report.mean_rounding_floor < (1.6 if report.positions > 30 else 4)
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
        PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=safe).save_pretrained(tmp_path / "out")
        assert outputs(base, adapter, tmp_path / "out").verdict == "agree"
    dora_convert.merge(base, adapter, tmp_path / "part", exclude=["*.layers.1.mlp.down_proj"])
    edit_json(tmp_path / "part" / "dora_convert" / "receipt.json", verb="?")  # which would say what was left out
    assert outputs(base, adapter, tmp_path / "part").verdict == "differ"


def test_figures_are_those_of_the_models(tmp_path):
    """Error, divergence and agreement as PEFT and transformers give them; the floor as real rounding leaves it."""
    from dora_convert.logits.samples import make_samples

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
    """If memory does not hold a whole model, its blocks are read one by one, and every figure is as before."""
    base, adapter, out = merged(tmp_path, family, **options)
    whole = outputs(base, adapter, out)
    notices = []
    part = outputs(base, adapter, out, max_memory=whole.memory_bytes - 1, on_notice=notices.append)
    assert (whole.offloaded, part.offloaded, part.verdict) == (False, True, "agree")
    assert part.memory_bytes < whole.memory_bytes
    assert any("block by block" in text for text in notices)
    figures = ("max_abs_logit_error", "mean_abs_logit_error", "mean_rounding_floor", "mean_kl", "top1_agreement")
    for name in figures:
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=1e-3), name
    wrong = changed(adapter, tmp_path / "scaled", lora_alpha=15)
    dora_convert.merge(base, wrong, tmp_path / "wrong")
    assert outputs(base, adapter, tmp_path / "wrong", max_memory=whole.memory_bytes - 1).verdict == "differ"


def test_too_little_memory(tmp_path, monkeypatch):
    """A limit below the largest module is refused, with the least that will do, before a model is loaded."""
    base, adapter, out = merged(tmp_path)
    with monkeypatch.context() as patch:
        patch.delattr(ModelLoader, "_load")
        with pytest.raises(UsageError, match="largest module") as caught:
            outputs(base, adapter, out, max_memory="9KB")
    least = re.search(r"\d+[KMG]iB", caught.value.hint)[0]
    assert outputs(base, adapter, out, max_memory=least).verdict == "agree"


def test_several_adapters(tmp_path):
    """Plain LoRAs add up, as PEFT has them active together; what was never trained together is undecidable."""
    base, first = trained(tmp_path, dora=False)
    _, second = trained(tmp_path, dora=False, name="second", seed=1, target_modules=["q_proj", "up_proj"], r=5)
    _, third = trained(tmp_path, name="third", seed=2)
    dora_convert.merge(base, [first, second], tmp_path / "out")
    assert outputs(base, [first, second], tmp_path / "out").verdict == "agree"
    assert outputs(base, first, tmp_path / "out").verdict == "differ"
    for adapters, options, words in (
        ([first, third], {}, "not trained together"),
        ([first, second], {"weight": [1, 0.5]}, "another weight="),
        ([first], {"exclude": ["*.q_proj"]}, "whole adapters"),
    ):
        with pytest.raises(DoraConvertError, match=words) as caught:
            outputs(base, adapters, tmp_path / "out", **options)
        assert caught.value.exit_code == 2
