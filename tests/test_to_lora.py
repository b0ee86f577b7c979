"""to-lora: the best plain LoRA of any adapter, which PEFT loads, with errors that are measured."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import DoraConvertError, NumericalError, UsageError

from . import peft_cases as tiny
from . import toy
from .commands import exit_code
from .peft_cases import SIGNAL, Case, adalora, bert, distance, gpt2, llama, lora, oracle, outputs
from .test_from_lora import TIED, apart, loaded
from .test_peft_matrix import noisy

GPT2 = ["c_attn", "c_proj", "c_fc"]
EXACT = {
    "dora": Case(llama(), lora(use_dora=True)),
    "dora gpt2": Case(gpt2(), lora(use_dora=True, target_modules=GPT2)),
    "dora rslora": Case(llama(), lora(use_dora=True, use_rslora=True, alpha_pattern={"q_proj": 3})),
    "dora embedding and head": Case(llama(), lora(use_dora=True, target_modules=["embed_tokens", "lm_head"])),
    "dora tied embedding": Case(TIED, lora(use_dora=True, target_modules=["embed_tokens", "q_proj"])),
    "dora convolutions": Case(
        tiny.plain, lora(use_dora=True, target_modules=["conv1", "conv2", "linear"]), inputs=SIGNAL
    ),
    "dora saves": Case(bert("BertForMaskedLM"), lora(use_dora=True, target_modules=["query"], bias="all")),
    "dora pissa": Case(llama(), lora(use_dora=True, init_lora_weights="pissa")),
    "lora": Case(llama(), lora(modules_to_save=["norm"])),
    "lora rslora patterns": Case(llama(), lora(use_rslora=True, rank_pattern={"q_proj": 2})),
    "lora tokens": Case(TIED, lora(trainable_token_indices=[9, 2, 58])),
    "lora replicated": Case(llama(num_hidden_layers=3), lora(layer_replication=[[0, 2], [1, 3]])),
    "lora_bias": Case(bert("BertForMaskedLM"), lora(target_modules=["query", "dense"], lora_bias=True)),
    "pissa": Case(llama(), lora(init_lora_weights="pissa")),
    "olora": Case(llama(), lora(init_lora_weights="olora")),
    "kasa": Case(llama(), lora(kasa_config=KasaConfig())),
    "adalora": Case(llama(), adalora(target_modules=["q_proj", "v_proj"]), after=tiny.pruned),
    "block-diagonal": Case(
        llama(), lora(target_modules=["q_proj"], use_bdlora=BdLoraConfig(None, ["q_proj"], nblocks=2))
    ),
    "experts and attention kept": Case(
        tiny.plain, lora(target_modules=["attn", "linear"], target_parameters=["experts.up"]), inputs=SIGNAL
    ),
    "tied on both sides": Case(
        TIED, lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_at_full_rank_outputs_are_the_adapters(tmp_path, name):
    """With no limit on the rank, PEFT's outputs of the LoRA are the adapter's, to 1e-5; no rank is above what it needs."""
    case = EXACT[name]
    with noisy():
        want = oracle(case, "float32", tmp_path)
        report = dora_convert.to_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "lora", rank=999)
        made = loaded(case, tmp_path, "lora")
        config = made.peft_config["default"]
        assert not config.use_dora
        assert config.peft_type == "LORA"
        assert distance(outputs(made, case.inputs), want) <= 1e-5
    assert report.relative_error <= 1e-5
    assert all(module.rank <= 75 for module in report.modules)


@pytest.mark.parametrize(
    ("name", "rank"), [("lora", 4), ("adalora", 6), ("block-diagonal", 4), ("lora_bias", 4), ("pissa", 8), ("olora", 8)]
)  # fmt: skip
def test_exact_ranks_are_kept(tmp_path, name, rank):
    """A LoRA keeps its rank; what began with another base needs twice its own; pruned singular values are no rank."""
    with noisy():
        oracle(EXACT[name], "float32", tmp_path)
    report = dora_convert.to_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "lora", rank=40)
    ranks = {module.rank for module in report.modules}
    assert max(ranks) <= rank
    assert ranks == {rank} or name == "adalora"


def change(base: toy.Base, adapter, name: str) -> torch.Tensor:
    return toy.exact(base, adapter)[name] - base.tensors[name].double()


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("exact_svd", [True, False])
def test_errors_are_those_of_the_best_factors(tmp_path, factor, exact_svd):
    """At rank 2r and 4r, each module's error is that of torch's SVD of ΔW, and it is what the files hold."""
    base = toy.make_base(tmp_path / "base")
    adapter = toy.make_adapter(tmp_path / "dora", base, dora=True)
    rank = factor * toy.RANK
    report = dora_convert.to_lora(base.path, adapter, tmp_path / "lora", rank=rank, exact_svd=exact_svd)
    made = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert len(report.modules) == 6
    total = lost = 0.0
    for module in report.modules:
        D = change(base, adapter, module.name)
        values = torch.linalg.svdvals(D)
        best = float(values[rank:].norm() / values.norm())
        rest = (D - toy.low_rank(made, module.name.removesuffix(".weight"))).norm()
        assert module.relative_error == pytest.approx(float(rest / D.norm()), rel=1e-5)
        assert module.relative_error == pytest.approx(best, rel=1e-2)
        needed = int((values.square().flip(0).cumsum(0).flip(0).sqrt() > 0.01 * values.norm()).sum())
        assert module.details["rank_for_1_percent"] == needed
        total, lost = total + float(D.square().sum()), lost + float(rest.square())
    assert report.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    assert report.details["merging_is_better"]


def test_output_error_is_measured(tmp_path, base):
    """‖(ΔW − BA)x‖/‖W'x‖ for random x is about the ratio of the Frobenius norms."""
    adapter = toy.make_adapter(tmp_path / "dora", base, dora=True)
    report = dora_convert.to_lora(base.path, adapter, tmp_path / "lora", rank=4)
    made = load_file(tmp_path / "lora/adapter_model.safetensors")
    for module in report.modules:
        D = change(base, adapter, module.name)
        rest = (D - toy.low_rank(made, module.name.removesuffix(".weight"))).norm()
        ratio = float(rest / toy.exact(base, adapter)[module.name].norm())
        assert module.details["output_error"] == pytest.approx(ratio, rel=0.3)


def test_resizing_a_lora(tmp_path, base):
    """A LoRA at a smaller rank is the best there is of s·BA, and the scaling of every module is 1."""
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False, rank=6)
    report = dora_convert.to_lora(base.path, adapter, tmp_path / "small", rank=3)
    given, made = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "small"))
    for module in report.modules:
        name = module.name.removesuffix(".weight")
        D = toy.ALPHA / 6 * toy.low_rank(given, name)
        values = torch.linalg.svdvals(D)
        assert module.rank == 3
        assert module.relative_error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-5)
        assert apart(toy.low_rank(made, name), D) > 1e-3
    config = json.loads((tmp_path / "small/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 3, {}, {})


def test_a_dora_that_is_a_lora_keeps_its_rank(tmp_path, base):
    """from-lora and to-lora give the LoRA back: its rank, and its function."""
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False)
    dora_convert.from_lora(base.path, adapter, tmp_path / "dora")
    report = dora_convert.to_lora(base.path, tmp_path / "dora", tmp_path / "again", rank=16)
    assert {module.rank for module in report.modules} == {toy.RANK}
    given, made = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "again"))
    for module in report.modules:
        name = module.name.removesuffix(".weight")
        assert apart(toy.low_rank(made, name), toy.ALPHA / toy.RANK * toy.low_rank(given, name)) <= 1e-6


@pytest.mark.parametrize("goal", [{"energy": 0.97}, {"max_error": 0.2}])
def test_ranks_by_module(tmp_path, goal):
    """The least rank that keeps the energy, or the error: a pattern for each module, which PEFT matches to it alone."""
    case = Case(llama(num_hidden_layers=12), lora(use_dora=True))
    with noisy():
        oracle(case, "float32", tmp_path)
        report = dora_convert.to_lora(
            tmp_path / "base", tmp_path / "adapter", tmp_path / "lora", ranks="per-module", **goal
        )
        made = loaded(case, tmp_path, "lora")
    bound = goal.get("max_error") or (1 - goal["energy"]) ** 0.5
    ranks = {module.name.removesuffix(".weight"): module.rank for module in report.modules}
    assert len(set(ranks.values())) > 1
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    for module in report.modules:
        assert module.relative_error <= bound
        if module.rank > 1:
            assert module.details["rank_for_1_percent"] > module.rank
    for name, rank in ranks.items():
        key = get_pattern_key(list(config["rank_pattern"]), name)
        assert config["rank_pattern"].get(key, config["r"]) == rank
        assert key == name or re.fullmatch(key, name)
        layer = made.base_model.model.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 1)
    merged = tmp_path / "merged"
    dora_convert.merge(tmp_path / "base", tmp_path / "lora", merged)
    dora_convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "want")
    W, got, want = (toy.load(tmp_path / name) for name in ("base", "merged", "want"))
    for module in report.modules:
        error = (got[module.name] - want[module.name]).norm() / (want[module.name] - W[module.name]).norm()
        assert float(error) == pytest.approx(module.relative_error, rel=1e-3)


def test_the_error_is_that_of_what_is_stored(tmp_path, base):
    """--dtype bfloat16 costs accuracy, and the report says how much."""
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False)
    report = dora_convert.to_lora(base.path, adapter, tmp_path / "half", rank=9, dtype="bfloat16")
    given, made = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "half"))
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    for module in report.modules:
        name = module.name.removesuffix(".weight")
        D = toy.ALPHA / toy.RANK * toy.low_rank(given, name)
        error = float((toy.low_rank(made, name) - D).norm() / D.norm())
        assert module.relative_error == pytest.approx(error, rel=1e-3)
        assert 1e-4 < error < 1e-2


def test_a_module_that_changes_nothing(tmp_path, base):
    """B = 0: zeros of the rank of all, or of rank 1, since PEFT knows no rank 0."""
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False)
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    tensors[key].zero_()
    save_file(tensors, adapter / "adapter_model.safetensors")
    for ranks, rank in ("per-module", 1), ("one", 4):
        report = dora_convert.to_lora(base.path, adapter, tmp_path / ranks, max_error=0.3, ranks=ranks)
        module = {module.name: module for module in report.modules}["model.layers.0.mlp.up_proj.weight"]
        assert (module.rank, module.relative_error) == (rank, 0)
        stored = load_file(tmp_path / ranks / "adapter_model.safetensors")[key]
        assert stored.shape[1] == rank
        assert not stored.any()


@pytest.mark.parametrize(
    "goal", [{}, {"rank": 4, "energy": 0.9}, {"rank": 0}, {"energy": 1.5}, {"max_error": 0.0}, {"max_error": -1}, {"rank": 2.5}, {"rank": "4"}, {"energy": "a"}]
)  # fmt: skip
def test_one_goal_is_needed(tmp_path, base, goal):
    """Exactly one of rank, energy and max_error, with a value that something can have."""
    adapter = toy.make_adapter(tmp_path / "lora", base, dora=False)
    with pytest.raises(UsageError):
        dora_convert.to_lora(base.path, adapter, tmp_path / "out", **goal)
    assert not list(tmp_path.glob("out*"))


def test_bad_input_is_named(tmp_path, base):
    """NaN in the base, an adapter of another base: the error says where, and nothing is written."""
    adapter = toy.make_adapter(tmp_path / "dora", base, dora=True)
    tensors = dict(base.tensors)
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")
    for path in base.path.glob("model*"):
        path.unlink()
    toy.write_shards(base.path, tensors, 1)
    with pytest.raises(NumericalError, match=r"layers.1.mlp.up_proj"):
        dora_convert.to_lora(base.path, adapter, tmp_path / "out", rank=4)
    plain = toy.make_adapter(tmp_path / "lora", base, dora=False)
    with pytest.raises(NumericalError, match=r"layers.1.mlp.up_proj"):  # for the outputs' error
        dora_convert.to_lora(base.path, plain, tmp_path / "out", rank=2)
    (tmp_path / "odd").mkdir()
    other = toy.make_adapter(tmp_path / "odd/lora", base, dora=False)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({key.replace("up_proj", "upp"): x for key, x in tensors.items()}, other / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(DoraConvertError, match="no place in the base"):
        dora_convert.to_lora(base.path, other, tmp_path / "out", rank=4)
    assert not list(tmp_path.glob("out*"))


def test_memory_is_announced(tmp_path, base, capsys):
    """--max-memory auto grows to the largest module's need, which a dry run says; less is refused with the least."""
    adapter = toy.make_adapter(tmp_path / "dora", base, dora=True)
    plan = dora_convert.to_lora(base.path, adapter, tmp_path / "out", rank=4, dry_run=True).plan
    assert plan["least_memory"] >= 4 * 4 * 96 * 40
    with pytest.raises(UsageError, match="does not hold") as caught:
        dora_convert.to_lora(base.path, adapter, tmp_path / "out", rank=4, max_memory=plan["least_memory"] - 1)
    assert "is the least" in caught.value.hint
    one = dora_convert.to_lora(base.path, adapter, tmp_path / "one", rank=4, max_memory=plan["least_memory"])
    assert one.bytes_written <= plan["bytes_out"]
    dora_convert.to_lora(base.path, adapter, tmp_path / "four", rank=4, workers=4)
    assert toy.contents(tmp_path / "one") == toy.contents(tmp_path / "four")


def test_command_line(tmp_path, base, capsys):
    """The JSON has the fields of the contract; a forgotten goal is exit 2 and says what to add."""
    adapter = toy.make_adapter(tmp_path / "dora", base, dora=True)
    assert exit_code("to-lora", base.path, adapter, tmp_path / "out") == 2
    assert "--rank 32" in capsys.readouterr().err
    assert exit_code("to-lora", base.path, adapter, tmp_path / "out", "--rank", 8, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["command"], report["format"]) == ("to-lora", "peft")
    assert report["modules"][0].keys() >= {"name", "rank", "relative_error", "output_error"}
    assert 0 < report["relative_error"] < 1
    assert exit_code("to-lora", base.path, adapter, tmp_path / "dry", "--energy", 0.9, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["plan"]["modules"]
    assert exit_code("to-lora", base.path, adapter, tmp_path / "two", "--rank", 8) == 0
    shown = capsys.readouterr()
    assert "relative error over all modules" in shown.out
    assert "merging would be the better way out" in shown.err
