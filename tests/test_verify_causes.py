"""What a wrong module must not be called: a cause is named where it explains the whole module, and where the config allows it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert

from .toy import Base, exact, load, make_adapter, make_base, rounded

BF16, FP32 = torch.bfloat16, torch.float32
FILE, PREFIX = "adapter_model.safetensors", "base_model.model."
SQUARE, WIDE = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
TARGETS = ("q_proj", "k_proj", "up_proj", "down_proj")
CAUSES = r"(?i)magnitude|axis|scaling|factor|alpha|not merged|twice|transposed|base|instead"


class Case(NamedTuple):
    base: Base
    adapter: Path
    out: Path


def edit(adapter: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change an adapter's tensors."""
    tensors = load_file(adapter / FILE)
    save_file({name: change(name, tensor).contiguous() for name, tensor in tensors.items()}, adapter / FILE)


def at_norms(base: Base, adapter: Path, *, of_base: bool) -> None:
    """Set magnitudes to ‖W + sBA‖, as from-lora does, or to ‖W‖, as training begins."""
    plain = {name: x.double() for name, x in base.tensors.items()}
    tensors = load_file(adapter / FILE)
    scale = scale_of(adapter)
    for name in [name for name in tensors if name.endswith("magnitude_vector")]:
        module = name.removesuffix(".lora_magnitude_vector")
        W = plain[f"{module.removeprefix(PREFIX)}.weight"]
        delta = tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()
        tensors[name] = (W if of_base else W + scale * delta).norm(dim=1).float()
    save_file(tensors, adapter / FILE)


def scale_of(adapter: Path) -> float:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"dora": False}, "LoRA of rank 4": {"dora": False, "rank": 4, "lora_alpha": 4},
    "rsLoRA": {"dora": False, "use_rslora": True}, "DoRA": {"dora": True}, "DoRA that from-lora made": {"dora": True},
    "DoRA at its start": {"dora": True}, "tiny LoRA": {"dora": False}, "tiny DoRA": {"dora": True},
}  # fmt: skip


def make(tmp_path: Path, kind: str, dtype: torch.dtype = BF16) -> Case:
    """A base, an adapter of a kind, and the right merge."""
    base = make_base(tmp_path / "base", dtype, shards=1)
    config = {"rank": 3, **ADAPTERS[kind]}
    adapter = make_adapter(tmp_path / "adapter", base, targets=TARGETS, **config)
    if "tiny" in kind:
        edit(adapter, lambda name, x: x * 1e-3 if "lora_B" in name else x)
    if "start" in kind or "tiny DoRA" in kind:
        edit(adapter, lambda name, x: x * 0.1 if "lora_B" in name else x)
        at_norms(base, adapter, of_base=True)
    if "from-lora" in kind:
        at_norms(base, adapter, of_base=False)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    return Case(base, adapter, tmp_path / "out")


def tamper(case: Case, name: str, value: torch.Tensor) -> None:
    tensors = load(case.out)
    assert not torch.equal(tensors[name], value.to(tensors[name].dtype))
    tensors[name] = value.to(tensors[name].dtype).contiguous()
    save_file(tensors, case.out / "model.safetensors", {"format": "pt"})


def judged(case: Case, name: str, **options: Any) -> str | None:
    """The cause that verify names for a module; it differs, alone, and the figures are there."""
    report = dora_convert.verify(case.base.path, case.adapter, case.out, **options)
    assert report.verdict == "differ"
    wrong = {module.name: module for module in report.modules if module.wrong_elements}
    assert wrong.keys() == {name}
    texts = [text for text in report.problems if name in text]
    assert len(texts) == 1
    assert re.search(rf"{wrong[name].wrong_elements:,} of .* {wrong[name].max_ulp} ulp", texts[0])
    assert (wrong[name].cause or "") in texts[0]
    assert wrong[name].cause or not re.search(CAUSES, texts[0].replace(name, ""))
    return wrong[name].cause


def at(x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor], *index: Any) -> torch.Tensor:
    x = x.clone()
    x[index] = change(x[index])
    return x


def noise(x: torch.Tensor, share: float) -> torch.Tensor:
    torch.manual_seed(7)
    return x + share * x.std() * torch.randn_like(x)


def largest(x: torch.Tensor) -> tuple[int, int]:
    return divmod(int(x.abs().argmax()), x.shape[1])


def steps(x: torch.Tensor, levels: int) -> torch.Tensor:
    """Rounded to so many levels a row, as quantisation does."""
    size = x.abs().amax(dim=1, keepdim=True) / levels
    return (x / size).round() * size


WRONG: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {  # of the right W' and W
    "one element a percent too large": lambda x, _: at(x, lambda y: y * 1.01, *largest(x)),
    "one element off by a half": lambda x, _: at(x, lambda y: y + 0.5, 3, 5),
    "one element zero": lambda x, _: at(x, lambda y: y * 0, *largest(x)),
    "one element of every row": lambda x, _: at(x, lambda y: y * 1.02 + 0.01, slice(None), 4),
    "one row a few percent too large": lambda x, _: at(x, lambda y: y * 1.04, 2),
    "one row a third too large": lambda x, _: at(x, lambda y: y * 4 / 3, 2),
    "one row of noise": lambda x, _: at(x, lambda y: noise(y, 1.0), 2),
    "one row zero": lambda x, _: at(x, lambda y: y * 0, 2),
    "two rows swapped": lambda x, _: at(x, lambda y: y.flip(0), [1, 2]),
    "rows turned upside down": lambda x, _: x.flip(0),
    "a percent of noise": lambda x, _: noise(x, 0.01),
    "much noise": lambda x, _: noise(x, 1.0),
    "two percent too large": lambda x, _: x * 1.02,
    "twice as large": lambda x, _: x * 2,
    "with another sign": lambda x, _: -x,
    "quantised to 8 bits": lambda x, _: steps(x, 127),
    "quantised to 4 bits": lambda x, _: steps(x, 7),
    "trained on": lambda x, W: x + 0.3 * W.std() * torch.outer(torch.ones(len(x)), torch.linspace(-1, 1, x.shape[1])),
}  # fmt: skip
"""Mistakes that are none of the known ones. Of some nothing is left in tiny dtypes; those are asserted to change something."""


EACH = [(kind, name, BF16) for kind in ADAPTERS for name in (SQUARE, WIDE)]
EACH += [(kind, WIDE, FP32) for kind in ("LoRA", "DoRA that from-lora made")]


@pytest.mark.parametrize(("kind", "name", "dtype"), EACH)
def test_what_no_known_mistake_explains_has_no_cause(tmp_path, kind, name, dtype):
    """The figures alone; a cause that explains some rows, or all of them no better than the right answer, is none."""
    case = make(tmp_path, kind, dtype)
    right, false = load(case.out)[name].double(), {}
    for what, wrong in WRONG.items():
        tamper(case, name, wrong(right, case.base.tensors[name].double()))
        if cause := judged(case, name):
            false[what] = cause
        tamper(case, name, right)
    assert not false


PARTS = {"one row": slice(2, 3), "some rows": slice(0, 7), "half of the rows": slice(None, None, 2)}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mistake", ["not merged", "half", "magnitude"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_cause_is_one_of_the_whole_module(tmp_path, kind, mistake, part):
    """Rows that a known mistake explains, where the others are right, are not that mistake of the module."""
    case = make(tmp_path, kind)
    right, W, delta = load(case.out)[WIDE].double(), case.base.tensors[WIDE].double(), change(case, WIDE)
    if mistake == "magnitude" and kind == "LoRA":
        mistake = "half"
    wrong = {"not merged": W, "half": grown(case, WIDE, W + 0.5 * delta), "magnitude": W + delta}[mistake]
    tamper(case, WIDE, at(right, lambda _: wrong[PARTS[part]], PARTS[part]))
    cause = judged(case, WIDE)
    assert cause is None or re.search(r"\brows?\b", cause)


def change(case: Case, name: str) -> torch.Tensor:
    """s·BA of a module, in float64."""
    tensors, module = load_file(case.adapter / FILE), PREFIX + name.removesuffix(".weight")
    B, A = (tensors[f"{module}.lora_{each}.weight"].double() for each in "BA")
    return scale_of(case.adapter) * B @ A


def grown(case: Case, name: str, V: torch.Tensor) -> torch.Tensor:
    """V with rows as long as the magnitudes, where there are some."""
    module = PREFIX + name.removesuffix(".weight")
    m = load_file(case.adapter / FILE).get(f"{module}.lora_magnitude_vector")
    return V if m is None else V * (m.double() / V.norm(dim=1))[:, None]


def scaled(case: Case, name: str, factor: float) -> str:
    """What is said of a module whose change was scaled by a wrong factor."""
    W = case.base.tensors[name].double()
    tamper(case, name, rounded(grown(case, name, W + factor * change(case, name)), BF16))
    return judged(case, name) or ""


def said(cause: str) -> float:
    """The factor in a sentence."""
    found = re.search(r"factor of (-?[\d.]+(e-?\d+)?)", cause)
    assert found, cause
    return float(found[1])


def test_half_of_a_lora_of_rank_4_is_not_about_roots(tmp_path):
    """1/√r is a half there, and the config says nothing of rsLoRA; for a DoRA the same."""
    cause = scaled(make(tmp_path, "LoRA of rank 4"), WIDE, 0.5)
    assert "√" not in cause
    assert said(cause) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("dora", [True, False], ids=["DoRA", "LoRA"])
@pytest.mark.parametrize("rslora", [True, False], ids=["rsLoRA", "alpha/r"])
@pytest.mark.parametrize("power", [-1.0, -0.5, 0.5, 1.0])
def test_scalings_that_the_config_allows(tmp_path, rank, dora, rslora, power):
    """α/r for α/√r and the like are named in the direction that the config has, and not in the other."""
    base = make_base(tmp_path / "base", BF16, shards=1)
    config = {"rank": rank, "lora_alpha": 7, "use_rslora": rslora}
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora, targets=TARGETS, **config)
    edit(adapter, lambda name, x: x * 8 if "lora_B" in name else x)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    factor = rank**power
    cause = scaled(Case(base, adapter, tmp_path / "out"), WIDE, factor)
    assert said(cause) == pytest.approx(factor, rel=0.01)
    wrong = r"instead of alpha/r\b" if rslora else "instead of alpha/√r"
    assert not re.search(wrong, cause)
    expected = {(True, -0.5): "alpha/r instead of alpha/√r", (False, 0.5): "alpha/√r instead of alpha/r"}
    assert rank == 4 or expected.get((rslora, power), "") in cause


@pytest.mark.parametrize("factor", [0.505, 0.496, 1.985, 2.02, 0.99, 1.03, -1.0, 0.0101])
@pytest.mark.parametrize("dora", [True, False], ids=["DoRA", "LoRA"])
def test_a_factor_near_a_known_one_is_not_it(tmp_path, factor, dora):
    """A factor is measured well enough to be told from its neighbours; it is said as it is, without a name."""
    base = make_base(tmp_path / "base", BF16, shards=1)
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora, targets=TARGETS, rank=3, lora_alpha=6)
    edit(adapter, lambda name, x: x * 20 if "lora_B" in name else x)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    cause = scaled(Case(base, adapter, tmp_path / "out"), WIDE, factor)
    assert not re.search(r"twice|half|no scaling|instead|divided|not merged", cause)
    assert not cause or said(cause) == pytest.approx(factor, rel=0.01)


def test_a_factor_of_two_has_several_causes(tmp_path):
    """Of rank 4, merged twice and α/√r are one; of two explanations none is stated alone."""
    cause = scaled(make(tmp_path, "LoRA of rank 4"), WIDE, 2.0)
    assert ("twice" in cause) == ("√" in cause)
    assert said(cause) == pytest.approx(2, rel=0.01)


def test_a_weight_that_was_not_applied_is_not_merging_twice(tmp_path):
    """Asked for at half strength and merged at full: the factor, and if there is a name, the weight's."""
    case = make(tmp_path, "LoRA")
    report = dora_convert.verify(case.base.path, case.adapter, case.out, weight=[0.5])
    assert report.verdict == "differ"
    causes = {module.cause for module in report.modules}
    assert all("2" in str(cause) for cause in causes)
    assert all("twice" not in cause or "weight" in cause for cause in causes if cause)


TRUE: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "not merged": ("not merged", lambda W, _, __: W),
    "magnitude": ("magnitude", lambda W, D, _: W + D),
    "transposed": ("transposed", lambda W, D, m: (W + D.T) * (m / (W + D.T).norm(dim=1))[:, None]),
    "axis": ("axis", lambda W, D, m: (W + D) * (m / (W + D).norm(dim=0))),
}


@pytest.mark.parametrize("mistake", TRUE)
def test_true_causes_are_still_named(tmp_path, mistake):
    """What explains every row, and the right answer does not."""
    case = make(tmp_path, "DoRA")
    m = load_file(case.adapter / FILE)[f"{PREFIX}{SQUARE.removesuffix('.weight')}.lora_magnitude_vector"]
    word, wrong = TRUE[mistake]
    value = wrong(case.base.tensors[SQUARE].double(), change(case, SQUARE), m.double())
    tamper(case, SQUARE, rounded(value, BF16))
    assert word in (judged(case, SQUARE) or "")


def test_no_mistake_that_all_modules_share_is_made_up(tmp_path):
    """One element of each module: no sentence about all of them."""
    case = make(tmp_path, "DoRA that from-lora made")
    tensors = load(case.out)
    for name in exact(case.base, case.adapter):
        if name.endswith("proj.weight"):
            x = tensors[name]
            tensors[name] = at(x, lambda y: y * 1.05, *largest(x.double()))
    save_file(tensors, case.out / "model.safetensors", {"format": "pt"})
    report = dora_convert.verify(case.base.path, case.adapter, case.out)
    assert report.verdict == "differ"
    assert {module.cause for module in report.modules} == {None}
    assert not [text for text in report.problems if re.search(r"\d+ of \d+ modules|another base", text)]


@pytest.mark.parametrize("factor", [1.015, 0.985, 1.01])
def test_a_module_that_is_off_as_a_whole_is_not_agreed_with(tmp_path, factor):
    """Roundings of a DoRA's steps may move a row by less than a percent, but not every row of a module the same way."""
    case = make(tmp_path, "DoRA")
    tamper(case, WIDE, load(case.out)[WIDE].double() * factor)
    assert judged(case, WIDE) is None
