"""analyze: ΔM, ΔD, ranks and rounding loss against direct float64 computations, series, files, and errors."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.analysis.statistics import interval, name_kinds, pearson
from dora_convert.errors import PlanError, UsageError

from .hubserver import run as hub_run
from .toy import HIDDEN, TARGETS, edit_json, exact, load, make_adapter, make_base, rounded, write_json, write_shards


def direct(W, V, *, turned=False):
    """ΔM, ΔD, ‖ΔW‖/‖W‖, stable and effective rank of one matrix, in float64, by their definitions."""
    W, V = (x.double().flatten(1) for x in (W, V))
    W, V = (x.T if turned else x for x in (W, V))
    n, m = W.norm(dim=1), V.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(W, V, dim=1, eps=0)
    S = torch.linalg.svdvals(V - W)
    p = (S / S.sum()).clamp(min=1e-300)
    return {
        "delta_magnitude": (m - n).abs().mean().item(),
        "delta_direction": (1 - cosine).mean().item(),
        "relative_change": ((V - W).norm() / W.norm()).item(),
        "stable_rank": (S.square().sum() / S[0] ** 2).item(),
        "effective_rank": (-(p * p.log()).sum()).exp().item(),
    }


def agrees(point, expected):
    for name, value in expected.items():
        assert getattr(point, name) == pytest.approx(value, rel=1e-6, abs=1e-12), (point.module, name)


def points_of(report):
    return {point.module: point for point in report.points}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_equal_the_definition(tmp_path, base, dora):
    """Every module, and the loss by rounding into the base's dtype."""
    adapter = make_adapter(tmp_path / "a", base, dora=dora)
    report = dora_convert.analyze(base.path, adapter)
    merged, points = exact(base, adapter), points_of(report)
    assert len(points) == len(report.points) == 6
    for module, point in points.items():
        W, V = base.tensors[f"{module}.weight"].double(), merged[f"{module}.weight"]
        agrees(point, direct(W, V))
        lost = (rounded(V, torch.bfloat16).double() - V).norm() / (V - W).norm()
        assert point.lost == pytest.approx(lost.item(), rel=1e-6)
        assert point.layer == int(module.split(".")[2])
        assert point.elements == W.numel()
    if not dora:
        assert all(point.effective_rank <= 4 for point in points.values())
        return
    m = load_file(adapter / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
    ]
    ratio = m.double().abs() / base.tensors["model.layers.0.mlp.up_proj.weight"].double().norm(dim=1)
    found = points["model.layers.0.mlp.up_proj"].norm_ratio
    assert found["least"] == pytest.approx(ratio.min().item())
    assert found["median"] == pytest.approx(ratio.median().item(), rel=0.02)


def tuned_of(path, base, change=lambda _, x: x, dtype=torch.float32):
    """A fine-tuned copy of a base, in one file."""
    torch.manual_seed(3)
    path.mkdir()
    tensors = {name: change(name, x.to(dtype)).contiguous() for name, x in base.tensors.items()}
    write_shards(path, tensors, 1)
    (path / "config.json").write_text((base.path / "config.json").read_text())
    return tensors


def moved(name, x):
    return x + 0.01 * torch.randn_like(x) if x.dim() > 1 else x


def test_a_fine_tune_equals_the_definition(tmp_path, base):
    """Full fine-tuning: wide and high matrices, an embedding by rows and by columns, and a norm that moved."""
    tuned = tuned_of(tmp_path / "t", base, lambda name, x: moved(name, x) if "layernorm" not in name else x * 1.5)
    report = dora_convert.analyze(base.path, tmp_path / "t")
    points = points_of(report)
    for name, W in base.tensors.items():
        if W.dim() > 1:
            agrees(points[name.removesuffix(".weight")], direct(W, tuned[name]))
    embedding = points["model.embed_tokens"]
    turned = direct(base.tensors["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"], turned=True)
    assert embedding.column_magnitude == pytest.approx(turned["delta_magnitude"], rel=1e-6)
    assert embedding.column_direction == pytest.approx(turned["delta_direction"], rel=1e-6)
    assert {each.tensor for each in report.vectors} == {f"model.layers.{n}.input_layernorm.weight" for n in (0, 1)}
    assert all(each.relative_change == pytest.approx(0.5) for each in report.vectors)


def test_tiny_changes_do_not_cancel(tmp_path, base):
    """A change of 1e-8 has a ΔD of 1e-16, which 1 − cos in float64 would lose."""
    base = make_base(tmp_path / "b32", torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    tuned_of(tmp_path / "t", base, lambda n, x: x * 1.25 if n == name else x, torch.float64)
    point = points_of(dora_convert.analyze(base.path, tmp_path / "t"))[name.removesuffix(".weight")]
    assert point.delta_direction < 1e-16
    assert point.relative_change == pytest.approx(0.25)
    noise = torch.randn(96, HIDDEN, dtype=torch.float64) * 1e-9
    tuned_of(tmp_path / "u", base, lambda n, x: x + noise if n == name else x, torch.float64)
    point = points_of(dora_convert.analyze(base.path, tmp_path / "u"))[name.removesuffix(".weight")]
    W = base.tensors[name].double()
    across = (noise - W * ((noise * W).sum(1) / W.square().sum(1))[:, None]).norm(dim=1)
    assert point.delta_direction == pytest.approx((across / W.norm(dim=1)).square().mean().item() / 2, rel=1e-5)


def test_conv1d_and_experts(tmp_path):
    """GPT-2's outputs are columns; experts are rows one below the other, and gpt-oss has theirs as columns."""
    torch.manual_seed(0)
    for kind, name, turned in (
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", True),
        ("qwen3_moe", "model.layers.0.mlp.experts.down_proj", False),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", True),
    ):
        folder = tmp_path / kind
        shape = (24, 40) if name.endswith(".weight") else (3, 24, 40)
        W = torch.randn(shape)
        V = W + 0.01 * torch.randn(shape)
        for path, tensor in ((folder / "base", W), (folder / "tuned", V)):
            path.mkdir(parents=True)
            save_file({name: tensor}, path / "model.safetensors", {"format": "pt"})
            write_json(path / "config.json", {"model_type": kind, "architectures": ["X"]})
        [point] = dora_convert.analyze(folder / "base", folder / "tuned").points
        each = [direct(*pair, turned=turned) for pair in (zip(W, V, strict=True) if W.dim() == 3 else [(W, V)])]
        for field in ("delta_magnitude", "delta_direction", "stable_rank", "effective_rank"):
            mean = sum(one[field] for one in each) / len(each)
            assert getattr(point, field) == pytest.approx(mean, rel=1e-6), (kind, field)


def test_large_matrices_are_sketched(tmp_path, base, monkeypatch):
    """σ₁ of a large matrix comes from one pass, and says so."""
    adapter = make_adapter(tmp_path / "a", base, dora=True)
    whole = points_of(dora_convert.analyze(base.path, adapter))
    monkeypatch.setattr("dora_convert.analysis.modules.MOST_SPECTRUM", 8)
    monkeypatch.setattr("dora_convert.analysis.spectrum.STEPS", 20)
    for module, point in points_of(dora_convert.analyze(base.path, adapter)).items():
        assert point.effective_rank is None
        assert point.stable_rank == pytest.approx(whole[module].stable_rank, rel=1e-9)
    asked = points_of(dora_convert.analyze(base.path, adapter, spectrum=True))
    assert [point.effective_rank for point in asked.values()] == [point.effective_rank for point in whole.values()]
    monkeypatch.setattr("dora_convert.analysis.modules.MOST_GRAM", 8)
    for module, point in points_of(dora_convert.analyze(base.path, adapter)).items():
        assert point.stable_rank_estimated
        assert point.effective_rank is None
        assert point.stable_rank == pytest.approx(whole[module].stable_rank, rel=1e-3)


def trainer_folder(path, base, steps=(100, 20, 3)):
    """A Trainer's output: a folder for each step, the changes growing with the steps."""
    path.mkdir()
    for step in steps:
        adapter = make_adapter(path / f"checkpoint-{step}", base, dora=True)
        file = adapter / "adapter_model.safetensors"
        tensors = {name: x * (step / 100 if "lora_B" in name else 1) for name, x in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    (path / "checkpoint-7").mkdir()
    (path / "checkpoint-7" / "optimizer.pt").touch()
    return path


def test_a_trainers_folder_is_a_series(tmp_path, base):
    """Steps are sorted by number; the correlation has a point for each layer and step."""
    folder = trainer_folder(tmp_path / "out", base)
    report = dora_convert.analyze(base.path, folder)
    assert [step.step for step in report.tuned] == [3, 20, 100]
    assert [step.step for step in dora_convert.analyze(base.path, sorted(folder.glob("*[03]"))).tuned] == [3, 20, 100]
    for kind, found in report.correlation.items():
        pairs = [(p.delta_direction, p.delta_magnitude) for p in report.points if p.kind == kind]
        x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
        assert found.r == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item())
        assert found.points == len(pairs) == 6
        assert found.low < found.r < found.high
        assert "points" in found.note
    assert not report.collision


def test_correlations_and_kinds():
    """Fisher's interval for r = 0.5 and n = 30 is (0.17, 0.73); fewer than four points have none."""
    assert interval(0.5, 30) == (pytest.approx(0.1704, abs=1e-4), pytest.approx(0.7290, abs=1e-4))
    assert interval(0.5, 3) == (None, None)
    assert pearson([(0, 1), (1, 1)]) == (None, None, None)
    assert pearson([(0, 1), (1, 1), (2, 1)]) == (None, None, None)
    assert pearson([(0, 1), (1, 3), (2, 5)]) == pytest.approx((1, 2, 1))
    names = ["h.0.attn.c_proj", "h.1.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc", "wte"]
    assert list(name_kinds(names).values()) == ["attn.c_proj", "attn.c_proj", "mlp.c_proj", "c_fc", "wte"]


def test_two_adapters_collide(tmp_path, base):
    """Cosine and opposite signs of two adapters' changes, and of an adapter with itself."""
    one = make_adapter(tmp_path / "one", base, dora=False)
    other = make_adapter(tmp_path / "two", base, dora=True, seed=5, targets=TARGETS[:2])
    report = dora_convert.analyze(base.path, [one, other])
    assert {each.module.rpartition(".")[2] for each in report.collision} == {"k_proj", "up_proj"}
    for each in report.collision:
        W = base.tensors[f"{each.module}.weight"].double()
        D, E = (exact(base, path)[f"{each.module}.weight"] - W for path in (one, other))
        assert each.cosine == pytest.approx(((D * E).sum() / D.norm() / E.norm()).item(), abs=1e-9)
        assert each.sign_conflicts == pytest.approx((D * E < 0).double().mean().item(), abs=2e-3)
    same = dora_convert.analyze(base.path, [one, one])
    assert all(each.cosine == pytest.approx(1) and not each.sign_conflicts for each in same.collision)


PAPER = {  # 7B and 13B of LLaMA, and Llama 3 8B: hidden, intermediate, layers, heads, key-value heads, vocabulary
    "7B": ((4096, 11008, 32, 32, 32, 32000), 32, {"lora": 0.826, "dora": 0.838, "half": 0.427}),
    "13B": ((5120, 13824, 40, 40, 40, 32000), 32, {"lora": 0.670, "dora": 0.681}),
    "3-8B": ((4096, 14336, 32, 32, 8, 128256), 32, {"lora": 0.700, "dora": 0.710, "half": 0.361}),
}


@pytest.mark.parametrize("name", PAPER)
def test_shares_of_the_paper(tmp_path, run, name):
    """Tables 1 and 15 of arXiv:2402.09353, from config.json and adapter_config.json alone."""
    (hidden, inner, layers, heads, keys, words), rank, shares = PAPER[name]
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": words,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "base").mkdir()
    write_json(tmp_path / "base" / "config.json", config)
    for kind, percent in shares.items():
        adapter = {
            "peft_type": "LORA", "r": rank // 2 if kind == "half" else rank, "use_dora": kind != "lora",
            "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        }  # fmt: skip
        assert dora_convert.trainable_share(config, adapter) == pytest.approx(percent / 100, abs=6e-6)
        (tmp_path / kind).mkdir()
        write_json(tmp_path / kind / "adapter_config.json", adapter)
    code, out, _ = run("analyze", tmp_path / "base", *(tmp_path / kind for kind in shares), "--json")
    found = json.loads(out)["trainable_share"]
    assert code == 0
    assert [round(100 * found[str(tmp_path / kind)], 3) for kind in shares] == list(shares.values())


def test_share_from_headers(tmp_path, base, adapter):
    """Trained / (base + trained), of the tensors themselves."""
    trained = sum(x.numel() for x in load_file(adapter / "adapter_model.safetensors").values())
    total = sum(x.numel() for x in base.tensors.values())
    report = dora_convert.analyze(base.path, adapter)
    assert list(report.trainable_share.values()) == [trained / (total + trained)]


def test_command_json_csv_and_table(tmp_path, base, adapter, run):
    """The fields of the contract, a line of CSV for each point, and the table for people."""
    code, out, err = run("analyze", base.path, adapter, "--json", "--csv", tmp_path / "points.csv")
    found = json.loads(out)
    assert code == 0
    assert err.startswith("device: ")
    wanted = {"checkpoint", "layer", "module", "delta_magnitude", "delta_direction", "relative_change", "stable_rank"}
    assert all(wanted | {"lost"} <= point.keys() for point in found["points"])
    assert found["schema"] == 1
    assert set(found["correlation"]) == {"k_proj", "up_proj", "down_proj"}
    assert all({"r", "points"} <= each.keys() for each in found["correlation"].values())
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["delta_magnitude"]) for row in rows] == [p["delta_magnitude"] for p in found["points"]]
    code, out, _ = run("analyze", base.path, adapter, "--top", 2)
    lines = [line for line in out.splitlines() if line.startswith("model.layers")]
    assert (code, len(lines)) == (0, 2)
    assert "4 modules more" in out
    farthest = max(found["points"], key=lambda p: p["relative_change"])
    assert lines[0].startswith(farthest["module"])
    assert run("analyze", base.path, adapter, "-q")[1].strip()


def test_selection_and_strangers(tmp_path, base, adapter, run):
    """--include and --exclude; a checkpoint of another model; a base that is an adapter; files that cannot be."""
    report = dora_convert.analyze(base.path, adapter, include="up_proj", exclude="*.1.*")
    assert [point.module for point in report.points] == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(UsageError, match="matches no module"):
        dora_convert.analyze(base.path, adapter, include="nothing")
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x.weight": torch.zeros(2, 3)}, other / "model.safetensors")
    with pytest.raises(PlanError, match="No matrix"):
        dora_convert.analyze(base.path, other)
    code, _, err = run("analyze", adapter, base.path)
    assert code == 2
    assert f"dora-convert analyze {base.path} {adapter}" in err
    for option, bad in (("--csv", tmp_path), ("--report", tmp_path / "no" / "x"), ("--plot", tmp_path / "x.gif")):
        code, out, err = run("analyze", base.path, adapter, option, bad)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
    assert run("analyze", base.path)[0] == 2


def test_notes_say_what_is_odd(tmp_path, base):
    """Training that did nothing, that hardly moved, and that exploded."""
    adapter = make_adapter(tmp_path / "a", base, dora=False)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)

    def notes(factor):
        save_file({n: x * (factor if "lora_B" in n else 1) for n, x in tensors.items()}, file, {"format": "pt"})
        return " ".join(dora_convert.analyze(base.path, adapter).notes)

    assert "changes nothing" in notes(0)
    assert "undertrained" in notes(1e-5)
    assert "rounding" in notes(1e-5)
    assert "explode" in notes(100)
    edit_json(adapter / "adapter_config.json", r=4)
    assert math.isfinite(dora_convert.analyze(base.path, adapter, compute_dtype="float32").points[0].delta_magnitude)


def test_a_merge_is_what_its_adapter_is(tmp_path, base, adapter):
    """A float32 merge moved as far as base + adapter, and is compared whatever its shards."""
    dora_convert.merge(base.path, adapter, tmp_path / "merged", dtype="float32")
    assert load(tmp_path / "merged")
    ours = points_of(dora_convert.analyze(base.path, adapter))
    for module, point in points_of(dora_convert.analyze(base.path, tmp_path / "merged")).items():
        if module in ours:
            assert point.delta_magnitude == pytest.approx(ours[module].delta_magnitude, rel=1e-5)
        else:
            assert point.relative_change == 0


def test_adapters_of_embeddings_convolutions_and_experts(tmp_path):
    """Factors that lie otherwise: ΔM and ΔD by rows, W' = W + s·BA by PEFT's rules."""
    torch.manual_seed(4)
    shapes = {"embed_tokens.weight": (72, 40), "conv.weight": (16, 8, 3), "mlp.experts.down_proj": (3, 24, 40)}
    base = {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    (tmp_path / "base").mkdir()
    write_shards(tmp_path / "base", base, 1)
    write_json(tmp_path / "base" / "config.json", {"architectures": ["X"], "model_type": "mixtral"})
    A, B = torch.randn(2, 72), torch.randn(40, 2)
    down, up = torch.randn(2, 8, 3), torch.randn(16, 2, 1)
    each_A, each_B = torch.randn(3, 2, 40), torch.randn(3, 24, 2)
    factors = {
        "embed_tokens.lora_embedding_A": A, "embed_tokens.lora_embedding_B": B,
        "conv.lora_A.weight": down, "conv.lora_B.weight": up,
        "mlp.experts.lora_A.weight": each_A.reshape(6, 40), "mlp.experts.lora_B.weight": each_B.permute(1, 2, 0).reshape(24, 6),
    }  # fmt: skip
    (tmp_path / "a").mkdir()
    save_file(
        {f"base_model.model.{n}": x.contiguous() for n, x in factors.items()},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    write_json(tmp_path / "a" / "adapter_config.json", {
        "peft_type": "LORA", "r": 2, "lora_alpha": 1, "peft_version": "0.21.2", "target_modules": ["embed_tokens", "conv"],
        "target_parameters": ["experts.down_proj"],
    })  # fmt: skip
    points = points_of(dora_convert.analyze(tmp_path / "base", tmp_path / "a"))
    deltas = {
        "embed_tokens": 0.5 * (B.double() @ A.double()).T,
        "conv": 0.5 * (up.double().flatten(1) @ down.double().flatten(1)).view(16, 8, 3),
        "mlp.experts.down_proj": 0.5 * each_B.double() @ each_A.double(),
    }
    assert set(points) == set(deltas)
    for name, delta in deltas.items():
        W = base.get(name, base.get(f"{name}.weight")).double()
        pair = (x.flatten(0, 1) if "experts" in name else x for x in (W, W + delta))
        expected = direct(*pair)
        for field in ("delta_magnitude", "delta_direction", "relative_change"):
            assert getattr(points[name], field) == pytest.approx(expected[field], rel=1e-6), (name, field)
        assert points[name].stable_rank <= 2 + 1e-9


def test_from_the_hub(hub, tmp_path):
    """A base and steps on the Hub; the adapter's weights and the base's are downloaded as they are needed."""
    base = make_base(hub.root / "base")
    hub.repos |= {"org/base": base.path, "me/adapter": make_adapter(hub.root / "adapter", base, dora=True)}
    done = hub_run(hub, tmp_path / "cache", "analyze", "org/base", "me/adapter", "--json", "--no-cache", HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    near = dora_convert.analyze(base.path, hub.root / "adapter")
    assert [p["delta_direction"] for p in found["points"]] == [p.delta_direction for p in near.points]
