"""PEFT is the oracle for everything it can put on disk: what base + adapter compute, the merged model must."""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import dora_convert
from dora_convert.errors import DoraConvertError

from .peft_cases import CASES, Case

PARTS = ("lora_A", "lora_B", "lora_E", "lora_diag", "lora_embedding", "magnitude", "modules_to_save", "bias", "token_adapter")  # fmt: skip
ROUNDING = {"bfloat16": 8e-3, "float16": 1e-3}


@contextmanager
def noisy():
    """PEFT and transformers warn of much that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save(model: nn.Module, folder: Path) -> None:
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def opened(case: Case, folder: Path, **config: Any) -> tuple[Any, dict[str, Any]]:
    """The model in a folder, by the class that the case trains, and what was missing or too much."""
    kind = case.opened or type(case.base()).__name__
    if hasattr(transformers, kind):
        return getattr(transformers, kind).from_pretrained(
            folder, output_loading_info=True, experts_implementation="eager", **config
        )
    tensors = load_file(folder / "model.safetensors")
    model = case.base().to(next(iter(tensors.values())).dtype)
    return model, model.load_state_dict(tensors, strict=True)._asdict()


def start(case: Case, folder: Path) -> Any:
    """The base as training finds it: with a head, with the vocabulary grown."""
    torch.manual_seed(5)
    model, _ = opened(case, folder, **({"num_labels": case.labels} if case.labels else {}))
    case.before(model)
    return model


def train(model: Any) -> None:
    """Move everything that training would move."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or "ranknum" in name:  # AdaLoRA's is never saved
                continue
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "bias" in name else 0.1))


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model computes, in float64."""
    given = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    found = model.double().eval()(**given)
    if isinstance(found, torch.Tensor):
        return found
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def check_every_part_matters(model: Any, inputs: dict[str, torch.Tensor], before: torch.Tensor) -> None:
    """No kind of trained tensor is one whose loss the comparison would miss."""
    for part in PARTS:
        mine = [p for name, p in model.named_parameters() if part in name and p.requires_grad and p.numel()]
        with torch.no_grad():
            for parameter in mine:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        if mine:
            after = outputs(model, inputs)
            assert distance(after, before) > 1e-3, part
            before = after


def oracle(case: Case, dtype: str, tmp_path: Path) -> torch.Tensor:
    """Write BASE and ADAPTER; return what PEFT computes with them, in memory and reloaded alike."""
    torch.manual_seed(3)
    save(case.base().to(getattr(torch, dtype)), tmp_path / "base")
    trained = get_peft_model(start(case, tmp_path / "base"), case.config())
    train(trained)
    case.after(trained)
    trained.eval().save_pretrained(tmp_path / "adapter")
    want = outputs(trained, case.inputs)
    again = PeftModel.from_pretrained(start(case, tmp_path / "base"), tmp_path / "adapter")
    assert distance(outputs(again, case.inputs), want) < 1e-6, "PEFT's own file is not what was trained"
    assert distance(outputs(start(case, tmp_path / "base"), case.inputs), want) > 1e-2
    check_every_part_matters(trained, case.inputs, want)
    case.edit(tmp_path / "adapter")
    return want


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes]
)
def test_merged_is_what_peft_computes(tmp_path, name, dtype):
    case = CASES[name]
    with noisy():
        want = oracle(case, dtype, tmp_path)
    dora_convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with noisy():
        merged, info = opened(case, tmp_path / "out")
    assert not info["missing_keys"]
    assert not info.get("mismatched_keys")
    assert all(key.startswith(case.left) for key in info["unexpected_keys"])
    assert {parameter.dtype for parameter in merged.parameters()} == {getattr(torch, dtype)}
    with noisy():
        got = outputs(merged, case.inputs)
    assert distance(got, want) <= ROUNDING.get(dtype, case.tolerance)
    check_config(case, tmp_path)


def check_config(case: Case, tmp_path: Path) -> None:
    """config.json says what must have changed, and nothing else."""
    if (tmp_path / "base/config.json").exists():
        base, out = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "out"))
        assert {key: value for key, value in out.items() if base.get(key) != value} == case.says
        assert base.keys() <= out.keys()
