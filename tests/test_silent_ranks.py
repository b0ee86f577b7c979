"""One rank and one alpha for all modules, so that every loader computes the same weights; SVDs by torch are the oracle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import dora_convert
from dora_convert.errors import DoraConvertError

from .toy import Base, exact, load, make_adapter, make_base

FILE, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
TARGETS = ("q_proj", "k_proj", "up_proj", "down_proj")


@pytest.fixture
def single(tmp_path) -> Base:
    """A float32 base: the smallest module has 24 outputs and 40 inputs, the largest 96 and 40."""
    return make_base(tmp_path / "base", torch.float32, shards=1)


@pytest.fixture
def dora(tmp_path, single) -> Path:
    return make_adapter(tmp_path / "dora", single, dora=True, targets=TARGETS)


def changes(base: Base, adapter: Path) -> dict[str, torch.Tensor]:
    """ΔW of every module that an adapter has, by the definition, in float64."""
    every = exact(base, adapter)
    deltas = {name: every[name] - tensor.double() for name, tensor in base.tensors.items()}
    return {name.removesuffix(".weight"): delta for name, delta in deltas.items() if delta.any()}


def least_rank(delta: torch.Tensor, error: float) -> int:
    """The least rank whose truncation error is no more than that, relative to the whole."""
    squares = torch.linalg.svdvals(delta).square()
    tails = squares.flip(0).cumsum(0).flip(0) / squares.sum()
    return int((tails > error**2).sum())


def best(delta: torch.Tensor, rank: int) -> float:
    """The relative error of the best factors of a rank."""
    S = torch.linalg.svdvals(delta)
    return float(S[rank:].norm() / S.norm())


def factors(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """B and A by module."""
    tensors = load_file(adapter / FILE)
    ends = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix(PREFIX): (
            tensors[f"{name}.lora_B.weight"].double(), tensors[f"{name}.lora_A.weight"].double(),
        )
        for name in ends
    }  # fmt: skip


def as_peft(adapter: Path) -> dict[str, float]:
    """Each module's scaling as PEFT has it, from its own config class and patterns."""
    config = PeftConfig.from_pretrained(adapter)
    found = {}
    for name in factors(adapter):
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        found[name] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return found


def as_llama_cpp(adapter: Path) -> dict[str, float]:
    """One alpha for all, over each tensor's own rank (llama-adapter.h); no patterns, no rsLoRA."""
    alpha = json.loads((adapter / CONFIG).read_text())["lora_alpha"]
    return {name: alpha / A.shape[0] for name, (_, A) in factors(adapter).items()}


def as_vllm(adapter: Path) -> dict[str, float]:
    """One alpha over one r, both from the config (PEFTHelper)."""
    config = json.loads((adapter / CONFIG).read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    return dict.fromkeys(factors(adapter), scale)


LOADERS: dict[str, Callable[[Path], dict[str, float]]] = {
    "PEFT": as_peft, "llama.cpp": as_llama_cpp, "vLLM": as_vllm,
}  # fmt: skip


def errors(adapter: Path, deltas: dict[str, torch.Tensor], loader: str) -> dict[str, float]:
    """Each module's relative error of what a loader makes of an adapter."""
    scales = LOADERS[loader](adapter)
    made = {name: scales[name] * B @ A for name, (B, A) in factors(adapter).items()}
    assert made.keys() == deltas.keys()
    return {name: float((made[name] - delta).norm() / delta.norm()) for name, delta in deltas.items()}


def one_rank(adapter: Path) -> int:
    """The rank of every module, and of the config, without patterns."""
    ranks = {A.shape[0] for _, A in factors(adapter).values()}
    config = json.loads((adapter / CONFIG).read_text())
    assert ranks == {config["r"]}
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    assert not config.get("use_rslora")
    return config["r"]


GOALS = {
    "error": {"max_error": 0.2}, "small error": {"max_error": 0.02}, "energy": {"energy": 0.9},
    "rank": {"rank": 6}, "a rank above one module's size": {"rank": 30}, "a rank above all": {"rank": 500},
}  # fmt: skip


def needed(deltas: dict[str, torch.Tensor], goal: dict[str, float]) -> int:
    """The largest rank that any module needs for a goal, and can have."""
    if "rank" in goal:
        return min(int(goal["rank"]), max(min(delta.shape) for delta in deltas.values()))
    error = goal["max_error"] if "max_error" in goal else (1 - goal["energy"]) ** 0.5
    return max(least_rank(delta, error) for delta in deltas.values())


@pytest.mark.parametrize("goal", GOALS)
def test_to_lora_has_one_rank_that_every_loader_reads(tmp_path, single, dora, goal):
    """The largest that any module needs; every module uses all of it for more of the change."""
    report = dora_convert.to_lora(single.path, dora, tmp_path / "lora", **GOALS[goal])
    deltas = changes(single, dora)
    rank = one_rank(tmp_path / "lora")
    assert rank == needed(deltas, GOALS[goal])
    assert {module.rank for module in report.modules} == {rank}
    for loader in LOADERS:
        for name, error in errors(tmp_path / "lora", deltas, loader).items():
            assert error == pytest.approx(best(deltas[name], rank), rel=1e-3, abs=2e-6), (loader, name)
    limit = GOALS[goal].get("max_error")
    assert limit is None or max(module.relative_error for module in report.modules) <= limit


def test_a_loras_own_ranks_become_one(tmp_path, single):
    """Patterns, rsLoRA and alphas of modules are folded; what has nothing more to give is filled with zeros."""
    adapter = make_adapter(tmp_path / "a", single, dora=False, targets=TARGETS, rank=6, use_rslora=True)
    deltas = changes_of_rs(single, adapter)
    dora_convert.to_lora(single.path, adapter, tmp_path / "lora", max_error=1e-6)
    assert one_rank(tmp_path / "lora") == 6
    for loader in LOADERS:
        assert max(errors(tmp_path / "lora", deltas, loader).values()) < 1e-5
    dora_convert.to_lora(single.path, adapter, tmp_path / "wide", rank=64)
    assert one_rank(tmp_path / "wide") == 6


def changes_of_rs(base: Base, adapter: Path) -> dict[str, torch.Tensor]:
    return {name: 6 / math.sqrt(6) * B @ A for name, (B, A) in factors(adapter).items()}


def test_modules_of_other_ranks(tmp_path, single):
    """An adapter with rank_pattern and alpha_pattern: one rank and one alpha come out of it."""
    adapter = make_adapter(
        tmp_path / "a", single, dora=False, targets=TARGETS, rank=6,
        rank_pattern={"k_proj": 2}, alpha_pattern={"up_proj": 30},
    )  # fmt: skip
    tensors = load_file(adapter / FILE)
    for name, tensor in tensors.items():
        if "k_proj" in name:
            tensors[name] = (tensor[:2] if "lora_A" in name else tensor[:, :2]).contiguous()
    save_file(tensors, adapter / FILE, {"format": "pt"})
    scales = {"k_proj": 6 / 2, "up_proj": 30 / 6}
    deltas = {name: scales.get(name.rpartition(".")[2], 1.0) * B @ A for name, (B, A) in factors(adapter).items()}
    dora_convert.to_lora(single.path, adapter, tmp_path / "lora", rank=16)
    assert one_rank(tmp_path / "lora") == 6
    for loader in LOADERS:
        assert max(errors(tmp_path / "lora", deltas, loader).values()) < 1e-5


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_extract_has_one_rank(tmp_path, single, dora, goal, kind):
    """The same of a fine-tuned checkpoint."""
    dora_convert.merge(single.path, dora, tmp_path / "tuned")
    dora_convert.extract(single.path, tmp_path / "tuned", tmp_path / "made", kind=kind, **GOALS[goal])
    rank = one_rank(tmp_path / "made")
    tuned = load(tmp_path / "tuned")
    if kind == "lora":
        names = [f"{name}.weight" for name in factors(tmp_path / "made")]
        deltas = {name[:-7]: tuned[name].double() - single.tensors[name].double() for name in names}
        assert rank == needed(deltas, GOALS[goal])
        for loader in LOADERS:
            for name, error in errors(tmp_path / "made", deltas, loader).items():
                assert error == pytest.approx(best(deltas[name], rank), rel=1e-3, abs=1e-5), (loader, name)
    else:
        dora_convert.merge(single.path, tmp_path / "made", tmp_path / "again")
        limit = GOALS[goal].get("max_error", (1 - GOALS[goal].get("energy", 0)) ** 0.5)
        for name, x in load(tmp_path / "again").items():
            change = float((tuned[name] - single.tensors[name]).norm())
            assert float((x - tuned[name]).norm()) <= limit * change * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("verb", ["to_lora", "extract"])
def test_ranks_per_module_only_where_asked(tmp_path, single, dora, verb):
    """Then each has the least that it needs, PEFT is right, and it is said who reads such an adapter wrongly."""
    dora_convert.merge(single.path, dora, tmp_path / "tuned")
    other = dora if verb == "to_lora" else tmp_path / "tuned"
    options = {"max_error": 0.2, **({} if verb == "to_lora" else {"kind": "lora"})}
    notices: list[str] = []
    report = getattr(dora_convert, verb)(
        single.path, other, tmp_path / "made", ranks="per-module", on_notice=notices.append, **options
    )
    deltas = changes(single, dora)
    ranks = {name: A.shape[0] for name, (_, A) in factors(tmp_path / "made").items()}
    assert len(set(ranks.values())) > 1
    assert all(abs(rank - least_rank(deltas[name], 0.2)) <= 1 for name, rank in ranks.items())
    assert max(errors(tmp_path / "made", deltas, "PEFT").values()) <= 0.2 * (1 + 1e-4)
    assert max(errors(tmp_path / "made", deltas, "llama.cpp").values()) > 0.25
    said = [*notices, *report.warnings]
    assert any("llama.cpp" in text and "rank" in text for text in said)
    plain = getattr(dora_convert, verb)(single.path, other, tmp_path / "one", **options)
    assert not any("llama.cpp" in text for text in plain.warnings)


def test_the_option_on_the_command_line(tmp_path, single, dora, run):
    """`--ranks one|per-module`; anything else is exit code 2 with both."""
    words = "to-lora", single.path, dora
    assert run(*words, tmp_path / "one", "--energy", 0.9, "-q")[0] == 0
    assert one_rank(tmp_path / "one")
    assert run(*words, tmp_path / "each", "--energy", 0.9, "--ranks", "per-module", "-q")[0] == 0
    assert json.loads((tmp_path / "each" / CONFIG).read_text())["rank_pattern"]
    code, _, err = run(*words, tmp_path / "x", "--energy", 0.9, "--ranks", "many")
    assert (code, "per-module" in err) == (2, True)
    with pytest.raises(DoraConvertError, match="per-module"):
        dora_convert.to_lora(*words[1:], tmp_path / "x", energy=0.9, ranks="many")


def test_a_rerun_after_an_interruption_has_the_same_rank(tmp_path, single, dora):
    """The rank of all is known only after all were looked at: the bytes are the same each time, with any workers."""
    for number, workers in enumerate((1, 3)):
        dora_convert.to_lora(single.path, dora, tmp_path / f"{number}", max_error=0.2, workers=workers)
    for name in (FILE, CONFIG):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_peft_itself_agrees(tmp_path):
    """A real model, loaded and merged by PEFT: its weights are those of the best factors."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 70, "hidden_size": 40, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False, initializer_range=0.1))
    model.save_pretrained(tmp_path / "base")
    base = Base(tmp_path / "base", load(tmp_path / "base"))
    adapter = make_adapter(tmp_path / "dora", base, dora=True, targets=TARGETS)
    dora_convert.to_lora(base.path, adapter, tmp_path / "lora", rank=30)
    rank, deltas = one_rank(tmp_path / "lora"), changes(base, adapter)
    assert rank == 30
    got = PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload().state_dict()
    for name, delta in deltas.items():
        made = got[f"{name}.weight"].double() - base.tensors[f"{name}.weight"].double()
        error = float((made - delta).norm() / delta.norm())
        assert error == pytest.approx(best(delta, rank), rel=1e-3, abs=1e-5)
