"""PEFT is the oracle: every layer kind it trains, every variant merged here, in its own files."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import dora_convert
from dora_convert.errors import DoraConvertError

from .toy import rounded


class Layers(nn.Module):
    """One layer of every kind that PEFT adapts, none of them square but `even`, each with an input of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(40, 24)
        self.even = nn.Linear(32, 32, bias=False)
        self.c_fc = Conv1D(24, 40)  # (out, in); its weight is (in, out)
        self.embed = nn.Embedding(50, 24)
        self.conv1 = nn.Conv1d(6, 10, 3)
        self.conv2 = nn.Conv2d(6, 10, (3, 2))
        self.conv3 = nn.Conv3d(4, 6, (2, 1, 3))
        self.point = nn.Conv2d(6, 10, 1)
        self.head = nn.Linear(24, 7)

    def forward(self, x):
        return {name: layer(x[name]) for name, layer in self.named_children()}


def inputs(dtype=torch.float64):
    torch.manual_seed(7)
    shapes = {
        "linear": (3, 40), "even": (3, 32), "c_fc": (3, 40), "conv1": (2, 6, 9), "conv2": (2, 6, 8, 7),
        "conv3": (2, 4, 5, 4, 6), "point": (2, 6, 4, 4), "head": (3, 24),
    }  # fmt: skip
    x = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return x | {"embed": torch.tensor([[0, 3, 49]])}


TARGETS = ["linear", "even", "c_fc", "embed", "conv1", "conv2", "conv3", "point"]
VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"conv[12]": 5, "linear": 2}, "alpha_pattern": {"c_fc": 20, ".onv1": 1}},
    "dora patterns": {"use_dora": True, "rank_pattern": {"embed": 7}, "alpha_pattern": {"embed|even": 11}},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "modules_to_save": {"modules_to_save": ["head"]},
    "dora modules_to_save": {"use_dora": True, "modules_to_save": ["head"]},
    "eva": {"init_lora_weights": "gaussian"},
}


def trained(dtype: torch.dtype, config: LoraConfig, tmp_path) -> tuple[nn.Module, PeftModel]:
    """A base in a dtype, saved with its adapter; the adapter's tensors are far from where training starts."""
    torch.manual_seed(3)
    model = Layers().to(dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base/model.safetensors", {"format": "pt"})
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    peft_model.save_pretrained(tmp_path / "adapter")
    base = Layers().to(dtype)
    base.load_state_dict(state)
    return base, peft_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_kind(tmp_path, dtype, variant):
    """The merged weights are what PEFT's unmerged model computes with, to the rounding of the stored dtype."""
    config = LoraConfig(r=4, target_modules=TARGETS, **{"lora_alpha": 6, **VARIANTS[variant]})
    base, _ = trained(dtype, config, tmp_path)
    report = dora_convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.verified.wrong_elements == report.verified.max_ulp == 0
    merged = load_file(tmp_path / "out/model.safetensors")

    oracle = (
        PeftModel.from_pretrained(base.double(), tmp_path / "adapter", autocast_adapter_dtype=False).double().eval()
    )
    x = inputs()
    want = oracle(x)
    exact = oracle.merge_and_unload().double().state_dict()
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        # PEFT's float64 is as good as ours but not the same to the last bit: ties aside, the rounding must agree
        off = tensor != rounded(exact[name], dtype)
        assert off.double().mean() <= (1e-2 if dtype == torch.float32 else 0), name

    model = Layers().double()
    model.load_state_dict({name: tensor.double() for name, tensor in merged.items()})
    got = model(x)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for name, y in want.items():
        assert (got[name] - y).norm() <= tolerance * y.norm(), name


def test_conv1d_square(tmp_path):
    """A square Conv1D looks like a Linear; the model's type and the module's name tell it apart."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=24, n_head=2, vocab_size=60, n_positions=16, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=3, lora_alpha=5, use_dora=True, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    check_logits(tmp_path, model, lora, GPT2LMHeadModel, tolerance=2e-6)


def test_llama(tmp_path):
    """Linear layers, embedding and head of an untied Llama, in safetensors shards made by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=70, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
    lora = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=targets)
    check_logits(tmp_path, model, lora, LlamaForCausalLM, tolerance=2e-6)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_resnet(tmp_path):
    """Convolutions of a real image model."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic")
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["convolution"])
    image = {"pixel_values": torch.randn(2, 3, 32, 32)}
    check_logits(tmp_path, model, lora, ResNetForImageClassification, tolerance=5e-6, inputs=image)


def check_logits(tmp_path, model, config, model_class, *, tolerance, inputs=None):
    """Train nothing, perturb everything, save, merge, load with transformers, compare with PEFT in float32."""
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    peft_model.eval().save_pretrained(tmp_path / "adapter")
    inputs = inputs or {"input_ids": torch.randint(0, 60, (2, 9))}
    with torch.no_grad():
        want = peft_model(**inputs).logits
        dora_convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        merged = model_class.from_pretrained(tmp_path / "out").eval()
        got = merged(**inputs).logits
        plain = model_class.from_pretrained(tmp_path / "base").eval()(**inputs).logits
    assert (got - want).norm() <= tolerance * want.norm()
    assert (plain - want).norm() > 1e-2 * want.norm()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "residual base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"init_lora_weights": "from_the_future"}, "init_lora_weights"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"peft_type": "PROMPT_TUNING"}, "no single weight equals it"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"peft_type": "PSOFT"}, "PSOFT"),
        ({"use_quantum": True}, "use_quantum"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(tmp_path, fields, word):
    """Whatever else a PEFT config can say stops the merge with its name."""
    trained(torch.float32, LoraConfig(r=4, target_modules=["linear"]), tmp_path)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert word in caught.value.text()
    assert not list(tmp_path.glob("out*"))
