"""200 sabotaged merges: verify names no cause but the true one, and names most of those."""

from __future__ import annotations

import random
import re
import shutil
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert

from .test_verify_causes import ADAPTERS, FILE, PREFIX, Case, change, grown, make, noise, scale_of, steps
from .toy import load, rounded

BF16 = torch.bfloat16
EACH = 200 // len(ADAPTERS)
AT_ONCE = 3
"""Sabotaged modules of a merge."""


class Module(NamedTuple):
    """What a mistake works on, in float64."""

    W: torch.Tensor
    delta: torch.Tensor
    right: torch.Tensor
    m: torch.Tensor | None
    case: Case
    name: str

    def scaled(self, factor: float) -> torch.Tensor:
        return grown(self.case, self.name, self.W + factor * self.delta)


def factor(one: Module, chance: random.Random) -> tuple[torch.Tensor, str]:
    """A scaling, sometimes a known one."""
    k = chance.choice([0.5, 2.0, 3**0.5, 3**-0.5, 3.0, 1 / 3, 1 / scale_of(one.case.adapter), chance.uniform(-1, 4)])
    return one.scaled(k), f"factor of {k}"


def axis(one: Module, _: random.Random) -> tuple[torch.Tensor, str]:
    V = one.W + one.delta
    return V * (one.m / V.norm(dim=0)), "axis"


def twice(one: Module, _: random.Random) -> tuple[torch.Tensor, str]:
    return grown(one.case, one.name, one.right + one.delta), "twice|factor of 2"


def transposed(one: Module, _: random.Random) -> tuple[torch.Tensor, str]:
    return grown(one.case, one.name, one.W + one.delta.T), "transposed"


TRUE = {
    "not merged": lambda one, _: (one.W, "not merged"),
    "magnitude": lambda one, _: (one.W + one.delta, "magnitude"),
    "factor": factor,
    "twice": twice,
    "transposed": transposed,
    "axis": axis,
}
"""The known mistakes, each with the words that may name it."""


def rows(one: Module, chance: random.Random) -> torch.Tensor:
    """A known mistake in some rows only."""
    wrong, _ = TRUE[chance.choice(["not merged", "factor", "twice"])](one, chance)
    chosen = torch.tensor([chance.random() < 0.4 for _ in range(len(one.W))])
    return torch.where(chosen[:, None], wrong, one.right)


def place(one: Module, chance: random.Random) -> tuple[int, int]:
    return chance.randrange(one.W.shape[0]), chance.randrange(one.W.shape[1])


def element(one: Module, chance: random.Random) -> torch.Tensor:
    wrong = one.right.clone()
    wrong[place(one, chance)] += chance.choice([-1, 1]) * chance.uniform(0.05, 2)
    return wrong


def tail(one: Module, chance: random.Random) -> torch.Tensor:
    """A write that stopped, or went on with another tensor's bytes."""
    wrong = one.right.flatten().clone()
    start = chance.randrange(len(wrong) // 2)
    wrong[start:] = chance.choice([torch.zeros_like(wrong[start:]), wrong[start:].roll(1)])
    return wrong.view_as(one.right)


def other(one: Module, chance: random.Random) -> torch.Tensor:
    """Another adapter's change, as long as the right one."""
    torch.manual_seed(chance.randrange(1 << 30))
    B, A = torch.randn(len(one.W), 3, dtype=torch.float64), torch.randn(3, one.W.shape[1], dtype=torch.float64)
    return grown(one.case, one.name, one.W + B @ A * (one.delta.norm() / (B @ A).norm()))


UNKNOWN = {
    "rows": rows,
    "element": element,
    "tail": tail,
    "another adapter": other,
    "noise": lambda one, chance: noise(one.right, 10 ** chance.uniform(-1.5, 0.5)),
    "too large": lambda one, chance: one.right * chance.choice([0.9, 1.03, 1.1, 2.0, -1.0]),
    "quantised": lambda one, chance: steps(one.right, chance.choice([7, 31, 127])),
    "rows turned": lambda one, chance: one.right.roll(chance.randrange(1, 9), 0),
    "columns scaled": lambda one, chance: one.right * torch.linspace(0.5, chance.uniform(1, 2), one.right.shape[1]),
    "a constant": lambda one, chance: one.right + chance.uniform(0.01, 0.1),
    "halves of two": lambda one, _: (one.W.flip(0) + one.right) / 2,
}
"""Mistakes of no name."""


def sabotage(case: Case, chance: random.Random) -> dict[str, tuple[torch.Tensor, str]]:
    """Wrong values of some modules, and the words that may name their causes; none may be called anything else."""
    right, wrong = load(case.out), {}
    tensors = load_file(case.adapter / FILE)
    for name in chance.sample([name for name in right if name.endswith("proj.weight")], AT_ONCE):
        m = tensors.get(f"{PREFIX}{name.removesuffix('.weight')}.lora_magnitude_vector")
        W = case.base.tensors[name].double()
        one = Module(W, change(case, name), right[name].double(), m if m is None else m.double(), case, name)
        fitting = [each for each in TRUE if m is not None or each not in ("magnitude", "axis")]
        fitting = [each for each in fitting if len(W) == W.shape[1] or each not in ("transposed", "axis")]
        if chance.random() < 0.4:
            value, word = TRUE[chance.choice(fitting)](one, chance)
        else:
            value, word = UNKNOWN[chance.choice(list(UNKNOWN))](one, chance), ""
        wrong[name] = rounded(value, BF16).contiguous(), word
    return wrong


def is_true(cause: str, word: str) -> bool:
    """Return True if the words name the mistake; a factor is the one that was taken, within a percent."""
    said, meant = (re.search(r"factor of (-?[\d.]+(?:e-?\d+)?)", text) for text in (cause, word))
    if said and meant:
        return float(said[1]) == pytest.approx(float(meant[1]), rel=0.01)
    return bool(word and re.search(word, cause))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_no_false_cause(tmp_path, kind):
    """Whatever was done to some modules: their causes are true, and right modules are not accused."""
    case, chance = make(tmp_path, kind), random.Random(kind)
    false, named, known = [], 0, 0
    shutil.copytree(case.out, tmp_path / "good")
    for number in range(EACH):
        wrong = sabotage(Case(case.base, case.adapter, tmp_path / "good"), chance)
        tensors = load(tmp_path / "good") | {name: value for name, (value, _) in wrong.items()}
        save_file(tensors, case.out / "model.safetensors", {"format": "pt"})
        for module in dora_convert.verify(case.base.path, case.adapter, case.out).modules:
            word = wrong[module.name][1] if module.name in wrong else ""
            known += bool(word and module.wrong_elements)
            named += bool(module.cause)
            if module.cause and not is_true(module.cause, word):
                false.append((number, module.name, word, module.cause))
    assert not false
    assert named >= (0.6 if "tiny" not in kind and "start" not in kind else 0) * known
