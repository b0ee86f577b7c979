"""from-lora: a DoRA that PEFT loads, and that computes what the LoRA did."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from safetensors.torch import load_file

import dora_convert
from dora_convert.errors import UsageError

from . import peft_cases as tiny
from . import toy
from .peft_cases import GROWN, SIGNAL, Case, bert, gpt2, llama, lora, oracle, start
from .test_peft_matrix import noisy

TIED = llama(tie_word_embeddings=True)
GPT2, QV, ALL = ["c_attn", "c_proj", "c_fc"], ["query", "value"], ["embed_tokens", "lm_head"]
scored = partial(Case, opened="LlamaForSequenceClassification", labels=3)

CASES = {
    "linear": Case(llama(), lora(), dtypes=("float32", "bfloat16", "float16")),
    "all linear": Case(llama(), lora(target_modules="all-linear"), dtypes=("float32", "bfloat16")),
    "rslora": Case(llama(), lora(use_rslora=True)),
    "patterns": Case(
        llama(), lora(rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 5}, alpha_pattern={"proj": 3})
    ),
    "conv1d of gpt2": Case(gpt2(), lora(target_modules=GPT2), dtypes=("float32", "bfloat16")),
    "embedding": Case(llama(), lora(target_modules=["embed_tokens", "q_proj"])),
    "head": Case(llama(), lora(target_modules=["lm_head", "q_proj"])),
    "embedding and head": Case(llama(), lora(target_modules=ALL), dtypes=("float32", "bfloat16")),
    "tied embedding": Case(TIED, lora(target_modules=["q_proj", "embed_tokens"])),
    "tied head": Case(TIED, lora(target_modules=["q_proj", "lm_head"])),
    "tied both": Case(TIED, lora(target_modules=ALL)),
    "tied gpt2": Case(gpt2(), lora(target_modules=["wte", "c_attn"])),
    "convolutions": Case(tiny.plain, lora(target_modules=["conv1", "conv2", "linear"]), inputs=SIGNAL),
    "resnet": Case(
        tiny.resnet, lora(target_modules=["convolution"], modules_to_save=["classifier"]), inputs=tiny.IMAGE
    ),
    "bert with biases": Case(bert("BertForMaskedLM"), lora(target_modules=QV, bias="all")),
    "t5": Case(tiny.t5, lora(target_modules=["q", "v", "wi", "wo"]), inputs=tiny.SEQUENCES),
    "modules_to_save": Case(llama(), lora(modules_to_save=["norm", "lm_head"])),
    "score": scored(llama(), lora(task_type="SEQ_CLS")),
    "tokens": Case(TIED, lora(trainable_token_indices=[9, 2, 58])),
    "tokens gpt2": Case(gpt2(), lora(target_modules=["c_attn"], trainable_token_indices={"wte": [41, 2]})),
    "grown": Case(llama(), lora(target_modules=[*ALL, "q_proj"]), before=tiny.grown, inputs=GROWN),
    "replicated": Case(llama(num_hidden_layers=3), lora(layer_replication=[[0, 2], [1, 3]])),
    "pissa": Case(llama(), lora(init_lora_weights="pissa")),
    "pissa conv1d": Case(  # with one thread PEFT's own sums are 2.2e-6 apart
        gpt2(), lora(target_modules=GPT2, init_lora_weights="pissa", use_rslora=True), slack=2
    ),
    "olora": Case(llama(), lora(init_lora_weights="olora")),
    "orthogonal": Case(llama(), lora(init_lora_weights="orthogonal")),
    "mica": Case(llama(), lora(init_lora_weights="mica")),
    "velora": Case(llama(), lora(velora_config=VeloraConfig(num_groups=4))),
    "monteclora": Case(llama(), lora(monteclora_config=MontecloraConfig())),
    "dropout": Case(llama(), lora(lora_dropout=0.3)),
}
BOUND = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}
"""PEFT adds a LoRA's output to the base's, and scales a DoRA's: sums in another order. A case may have more slack."""


def loaded(case: Case, tmp_path: Path, adapter: str):
    """Load a base and an adapter's folder with PEFT, which must find every tensor that it looks for."""
    model = PeftModel.from_pretrained(start(case, tmp_path / "base"), tmp_path / adapter)
    stored = set(load_file(tmp_path / adapter / "adapter_model.safetensors"))
    wanted = {name.replace(".default", "") for name in model.state_dict() if ".lora_" in name}
    wanted = {name.replace("magnitude_vector.weight", "magnitude_vector") for name in wanted}
    assert {name for name in stored if ".lora_" in name} == {name for name in wanted if "sampler" not in name}
    return model.eval()


@torch.no_grad()
def logits(model, inputs):
    """Return a model's outputs in its own precision."""
    dtype = next(model.parameters()).dtype
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    found = model(*given.values()) if "x" in given else model(**given)
    found = found if isinstance(found, torch.Tensor) else found.get("logits", found[0])
    return found.double()


def apart(one, other) -> float:
    """The largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes])
def test_outputs_are_the_loras(tmp_path, name, dtype):
    """PEFT loads the DoRA, and its outputs differ from the LoRA's by rounding alone."""
    case = CASES[name]
    with noisy():
        oracle(case, dtype, tmp_path)
        report = dora_convert.from_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "dora")
        before = PeftModel.from_pretrained(start(case, tmp_path / "base"), tmp_path / "adapter").eval()
        after = loaded(case, tmp_path, "dora")
        assert after.peft_config["default"].use_dora
        want = logits(before, case.inputs)
        assert apart(logits(after, case.inputs), want) <= case.slack * BOUND[dtype]
        assert apart(logits(start(case, tmp_path / "base").eval(), case.inputs), want) > 0.02
    assert report.relative_error < 1e-5
    tensors, given = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("dora", "adapter"))
    for key, tensor in given.items():
        if "velora" not in key and "sampler" not in key:
            assert torch.equal(tensors[key], tensor), key
    added = tensors.keys() - given.keys()
    assert added
    assert all(key.endswith("lora_magnitude_vector") for key in added)
    assert {tensors[key].dtype for key in added} == {torch.float32}


@pytest.mark.parametrize("name", ["linear", "conv1d of gpt2", "embedding", "convolutions", "pissa"])
def test_it_merges_to_what_the_lora_merges_to(tmp_path, name):
    """Our merge of the DoRA is our merge of the LoRA, up to the magnitude's rounding to float32."""
    case = CASES[name]
    with noisy():
        oracle(case, "float32", tmp_path)
    dora_convert.from_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "dora")
    for adapter in ("adapter", "dora"):
        dora_convert.merge(tmp_path / "base", tmp_path / adapter, tmp_path / f"merged-{adapter}")
    one, other = (toy.load(tmp_path / f"merged-{adapter}") for adapter in ("dora", "adapter"))
    for key, tensor in other.items():
        assert apart(one[key].double(), tensor.double()) <= 2e-7, key


def test_magnitudes_are_norms(tmp_path, base):
    """m is ‖W + sBA‖ of each row in float32, or ‖W‖ with --init pretrained; the config says DoRA."""
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for init in ("preserve", "pretrained"):
        dora_convert.from_lora(base.path, adapter, tmp_path / init, init=init)
        made = load_file(tmp_path / init / "adapter_model.safetensors")
        for name in tensors:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if module == name.removeprefix("base_model.model."):
                continue
            V = base.tensors[f"{module}.weight"].double()
            if init == "preserve":
                V = V + toy.ALPHA / toy.RANK * toy.low_rank(tensors, module)
            m = made[f"base_model.model.{module}.lora_magnitude_vector"]
            assert torch.equal(m, V.norm(dim=1).float())
    config = json.loads((tmp_path / "preserve/adapter_config.json").read_text())
    assert config == json.loads((adapter / "adapter_config.json").read_text()) | {"use_dora": True} | {
        key: config[key] for key in config.keys() - json.loads((adapter / "adapter_config.json").read_text())
    }


def test_pretrained_says_what_it_changes(tmp_path, base):
    """With m = ‖W‖ the outputs are not the LoRA's, and the report says by how much."""
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False)
    report = dora_convert.from_lora(base.path, adapter, tmp_path / "out", init="pretrained")
    tensors = load_file(adapter / "adapter_model.safetensors")
    lost = change = 0.0
    for module in report.modules:
        name = module.name.removesuffix(".weight")
        W, delta = base.tensors[module.name].double(), toy.ALPHA / toy.RANK * toy.low_rank(tensors, name)
        V = W + delta
        got = V * (W.norm(dim=1) / V.norm(dim=1))[:, None]
        assert module.relative_error == pytest.approx(float((got - V).norm() / delta.norm()), rel=1e-6)
        lost, change = lost + float((got - V).square().sum()), change + float(delta.square().sum())
    assert report.relative_error == pytest.approx((lost / change) ** 0.5, rel=1e-6)
    assert report.relative_error > 0.05


def test_bytes_do_not_depend_on_workers_or_memory(tmp_path, base):
    """One worker or four, the least memory or much: the same files, also when written again."""
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False)
    least = dora_convert.from_lora(base.path, adapter, tmp_path / "no", dry_run=True).plan["least_memory"]
    assert not (tmp_path / "no").exists()
    found = []
    for number, options in enumerate([{"workers": 1}, {"workers": 4}, {"max_memory": least}]):
        dora_convert.from_lora(base.path, adapter, tmp_path / f"out{number}", **options)
        found.append(toy.contents(tmp_path / f"out{number}"))
    assert found[0] == found[1] == found[2]
    assert sorted(found[0]) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="max_memory"):
            dora_convert.from_lora(base.path, adapter, tmp_path / "out9", max_memory=least - 1, dry_run=dry_run)


def test_dtype_is_for_all_but_magnitudes(tmp_path, base):
    """--dtype bfloat16 rounds the factors once; a magnitude in half precision would be off by a third of a percent."""
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False)
    dora_convert.from_lora(base.path, adapter, tmp_path / "out", dtype="bfloat16")
    given = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "out/adapter_model.safetensors").items():
        if name in given:
            assert torch.equal(tensor, given[name].bfloat16())
        else:
            assert tensor.dtype == torch.float32


def test_the_card_names_repos_only(tmp_path, base):
    """No path is written; --base-model gives the repo id where BASE is one; the tokenizer goes along."""
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    dora_convert.from_lora(base.path, adapter, tmp_path / "out")
    dora_convert.from_lora(base.path, adapter, tmp_path / "named", base_model="org/base")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model:" not in card
    assert str(tmp_path) not in card
    assert "base_model: org/base\n" in (tmp_path / "named/README.md").read_text()
    config = json.loads((tmp_path / "named/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
