"""Tiny bases, and adapters as PEFT trains and saves them or as older and other tools leave them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

TOKENS = torch.tensor([[2, 9, 5, 33, 12, 60, 41], [7, 14, 9, 21, 2, 58, 36]])
IDS = {"input_ids": TOKENS}
GROWN = {"input_ids": torch.cat([TOKENS, torch.tensor([[71], [74]])], dim=1)}
SEQUENCES = {**IDS, "decoder_input_ids": TOKENS.flip(1)}
SIGNAL = {"x": torch.sin(torch.arange(2 * 7 * 9).reshape(2, 7, 9).float())}
IMAGE = {"pixel_values": torch.sin(torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32) * 0.37)}
PARTS = ("lora_A", "lora_B", "lora_E", "lora_diag", "lora_embedding", "magnitude", "modules_to_save", "bias", "token_adapter")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One base and one adapter: what is trained and how its files look."""

    base: Callable[[], nn.Module]
    config: Callable[[], PeftConfig]
    opened: str = ""  # the transformers class that trains, where it is not the one that was saved
    labels: int | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=lambda: IDS)
    before: Callable[[Any], object] = lambda _: None  # done to the base in memory before it is wrapped
    after: Callable[[Any], object] = lambda _: None  # done to the trained adapter before it is saved
    edit: Callable[[Path], object] = lambda _: None  # done to the saved adapter
    says: dict[str, Any] = field(default_factory=dict)  # what OUT/config.json says that the base's does not
    left: tuple[str, ...] = ()  # prefixes of base tensors that the trained class does not have
    dtypes: tuple[str, ...] = ("float32",)
    slack: float = 1  # on the tolerance
    may_refuse: bool = False  # a refusal will do, another function will not


# ---- bases


def scrambled(model: nn.Module) -> nn.Module:
    """Nothing at its initial value: neither norms at one nor biases at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@dataclass(frozen=True)
class Tiny:
    """A random transformers model."""

    kind: str
    config: dict[str, Any]

    def __call__(self) -> nn.Module:
        cls = getattr(transformers, self.kind)
        return scrambled(cls(cls.config_class(**self.config)))


SIZES = {"vocab_size": 70, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.1}  # fmt: skip
LLAMA = {**SIZES, "intermediate_size": 56, "num_key_value_heads": 2, "pad_token_id": 0}


def llama(kind: str = "LlamaForCausalLM", **config: Any) -> Tiny:
    return Tiny(kind, LLAMA | config)


def bert(kind: str) -> Tiny:
    return Tiny(kind, {**SIZES, "intermediate_size": 56, "max_position_embeddings": 16})


def gpt2(kind: str = "GPT2LMHeadModel") -> Tiny:
    ends = {"bos_token_id": 1, "eos_token_id": 1, "vocab_size": 70, "initializer_range": 0.1}
    return Tiny(kind, {"n_layer": 2, "n_embd": 24, "n_head": 2, "n_positions": 16, **ends})


def gpt_oss(intermediate: int) -> Tiny:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return Tiny("GptOssForCausalLM", LLAMA | experts | {"intermediate_size": intermediate})


qwen3_moe = llama("Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, head_dim=8)  # fmt: skip
t5 = Tiny("T5ForConditionalGeneration", {"vocab_size": 70, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3, "decoder_start_token_id": 0, "pad_token_id": 0})  # fmt: skip
resnet = Tiny("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3})  # fmt: skip
qwen3_vl = Tiny("Qwen3VLForConditionalGeneration", {
    "text_config": {**LLAMA, "head_dim": 8, "tie_word_embeddings": True, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0], "patch_size": 4, "num_position_embeddings": 16},
    "image_token_id": 66, "video_token_id": 67, "vision_start_token_id": 68, "vision_end_token_id": 69, "tie_word_embeddings": True,
})  # fmt: skip
gemma3 = Tiny("Gemma3ForConditionalGeneration", {
    "text_config": {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8}, "mm_tokens_per_image": 4,
    "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    "image_token_index": 68, "boi_token_index": 66, "eoi_token_index": 67,
})  # fmt: skip


class Experts(nn.Module):
    """Fused experts, (expert, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 20, 32))
        self.down = nn.Parameter(torch.randn(3, 24, 20))

    def forward(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("eoi,bti->bteo", self.up, x).tanh() / 5
        return torch.einsum("eoi,btei,bte->bto", self.down, y, share)


class Matrix(nn.Module):
    """A bare two-dimensional parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(10, 24) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.matrix)


class Plain(nn.Module):
    """Layers that transformers models lack: attention by torch, bare parameters, convolutions with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.linear = (nn.Conv1d(7, 24, 3), nn.Conv2d(24, 32, (1, 2)), nn.Linear(32, 32))
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.router, self.experts, self.last = nn.Linear(32, 3), Experts(), Matrix()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x)[..., None, :].repeat(1, 1, 2, 1)).mean(2).transpose(1, 2)
        x = self.linear(x)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.last(self.experts(x, self.router(x).softmax(-1)))


def plain() -> nn.Module:
    return scrambled(Plain())


def grouped() -> nn.Module:
    return scrambled(nn.Sequential(nn.Conv1d(7, 8, 3), nn.Conv1d(8, 12, 3, groups=2)))


# ---- adapters


def lora(**fields: Any) -> Callable[[], PeftConfig]:
    return lambda: LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **fields}
    )


def adalora(**fields: Any) -> Callable[[], PeftConfig]:
    sizes = {"init_r": 6, "target_r": 4, "tinit": 1, "tfinal": 1, "total_step": 9, "lora_alpha": 60}
    return lambda: AdaLoraConfig(**sizes, **fields)


def pruned(model: Any) -> None:
    """Mask singular values to zero as AdaLoRA's allocator does: some in each layer, in one layer all of them."""
    pattern: dict[str, list[bool]] = {}
    for number, (name, parameter) in enumerate(model.base_model.model.named_parameters()):
        if "lora_E" in name:
            pattern[name] = [bool(pattern) and (number + rank) % 3 != 0 for rank in range(6)]
            parameter.data[~torch.tensor(pattern[name])] = 0
    model.peft_config["default"].rank_pattern = pattern


def grown(model: Any) -> None:
    model.resize_token_embeddings(75, mean_resizing=False)


def fields(**changes: Any) -> Callable[[Path], None]:
    """The saved config says something else."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def renamed(*pairs: tuple[str, str], lost: str = "\0") -> Callable[[Path], None]:
    """The saved tensors have other names, each pair being what becomes what, once; those with `lost` are gone."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = {name: tensor for name, tensor in load_file(path).items() if lost not in name}
        for old, new in pairs:
            tensors = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
        save_file(tensors, path)

    return edit


def pickled(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


# ---- the oracle


def save(model: nn.Module, folder: Path) -> None:
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def opened(case: Case, folder: Path, **config: Any) -> tuple[Any, dict[str, Any]]:
    """The model in a folder, by the class that the case trains, and what was missing or too much."""
    kind = case.opened or getattr(case.base, "kind", None)
    if kind:  # the grouped matrix product of experts knows no float64
        config |= {"experts_implementation": "eager", "output_loading_info": True}
        return getattr(transformers, kind).from_pretrained(folder, **config)
    tensors = load_file(folder / "model.safetensors")
    model = case.base().to(next(iter(tensors.values())).dtype)
    return model, model.load_state_dict(tensors, strict=True)._asdict()


def start(case: Case, folder: Path) -> Any:
    """The base as training finds it: with a head, with the vocabulary grown."""
    torch.manual_seed(5)
    model, _ = opened(case, folder, **({"num_labels": case.labels} if case.labels else {}))
    case.before(model)
    return model


@torch.no_grad()
def train(model: Any) -> None:
    """Move everything that training would move."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "ranknum" in name:  # AdaLoRA's number is never saved
            continue
        if "magnitude" in name:
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
        else:
            parameter.add_(torch.randn_like(parameter) * (0.3 if "bias" in name else 0.1))


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the model's outputs in float64."""
    given = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    found = model.double().eval()(*given.values()) if "x" in given else model.double().eval()(**given)
    if isinstance(found, torch.Tensor):
        return found
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@torch.no_grad()
def check_every_part_matters(model: Any, inputs: dict[str, torch.Tensor], before: torch.Tensor) -> None:
    """No kind of trained tensor is one whose loss the comparison would miss."""
    for part in PARTS:
        mine = [p for name, p in model.named_parameters() if part in name and p.requires_grad and p.numel()]
        for parameter in mine:
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        if mine:
            after = outputs(model, inputs)
            assert distance(after, before) > 1e-3, part
            before = after


def prepared(case: Case, dtype: str, tmp_path: Path) -> Any:
    """Write BASE and ADAPTER, as PEFT saves it; return the trained model."""
    torch.manual_seed(3)
    save(case.base().to(getattr(torch, dtype)), tmp_path / "base")
    trained = get_peft_model(start(case, tmp_path / "base"), case.config())
    train(trained)
    case.after(trained)
    trained.eval().save_pretrained(tmp_path / "adapter")
    return trained


def oracle(case: Case, dtype: str, tmp_path: Path) -> torch.Tensor:
    """Write BASE and ADAPTER; return what PEFT computes with them unmerged, in memory and reloaded alike."""
    trained = prepared(case, dtype, tmp_path)
    want = outputs(trained, case.inputs)
    again = PeftModel.from_pretrained(start(case, tmp_path / "base"), tmp_path / "adapter")
    assert distance(outputs(again, case.inputs), want) < 1e-6, "PEFT's own file is not what was trained"
    assert distance(outputs(start(case, tmp_path / "base"), case.inputs), want) > 5e-2
    check_every_part_matters(trained, case.inputs, want)
    case.edit(tmp_path / "adapter")
    return want
