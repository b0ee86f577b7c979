"""Several adapters combined: PEFT's merge_utils on the dense float64 changes, and PEFT's own chain, are the oracles."""

from __future__ import annotations

import json

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import dora_convert
from dora_convert.cli import main
from dora_convert.engine.quick_combine import QuickCombiner
from dora_convert.engine.quick_thresholds import QuickThresholds
from dora_convert.engine.thresholds import Thresholds
from dora_convert.errors import PlanError, RefError, UnsupportedError, UsageError, VerificationError
from dora_convert.maths.block_steps import count_block, norms_of_block, sample_of_block
from dora_convert.maths.in_single import combine_block, exact_elements

from .toy import contents, exact, load, make_adapter, make_base, stopped

WEIGHTS = (0.7, -0.4, 1.3)
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A float32 base; two DoRAs and a LoRA, one of which leaves a module out; and their dense changes."""
    folder = tmp_path_factory.mktemp("methods")
    base = make_base(folder / "base", torch.float32, layers=1)
    adapters = [
        make_adapter(folder / "a", base, dora=True, seed=2),
        make_adapter(folder / "b", base, dora=True, seed=3, targets=("mlp.up_proj", "mlp.down_proj")),
        make_adapter(folder / "c", base, dora=False, seed=4),
    ]
    changes = []
    for adapter in adapters:
        merged = exact(base, adapter)
        changes.append({name: merged[name] - x.double() for name, x in base.tensors.items()})
    return folder, base, adapters, changes


def combined(case, combine):
    """Every weight, as an oracle combines the changes of those adapters that have one."""
    _, base, _, changes = case
    want = {}
    for name, x in base.tensors.items():
        present = [number for number, change in enumerate(changes) if change[name].any()]
        want[name] = x.double()
        if present:
            weights = torch.tensor([WEIGHTS[number] for number in present]).double()
            want[name] = want[name] + combine([changes[number][name] for number in present], weights)
    return want


def close(got, want):
    assert got.keys() == want.keys()
    for name, x in got.items():
        torch.testing.assert_close(x.double(), want[name].double(), rtol=0, atol=3e-7)


ORACLES = {
    "linear": (merge_utils.task_arithmetic, {}),
    "sum": (merge_utils.task_arithmetic, {}),
    "magnitude-prune": (lambda x, w: merge_utils.magnitude_prune(x, w, 0.3), {"density": 0.3}),
    "ties": (lambda x, w: merge_utils.ties(x, w, 0.4), {"density": 0.4}),
    "ties by frequency": (
        lambda x, w: merge_utils.ties(x, w, 0.7, "frequency"), {"density": 0.7, "majority_sign": "frequency"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ORACLES)
def test_as_peft_combines(case, tmp_path, method):
    """In float32; DoRA's magnitudes are part of each change. The receipt repeats the method, and verify judges it."""
    _, base, adapters, _ = case
    oracle, options = ORACLES[method]
    options = {"method": method.partition(" ")[0], "weight": WEIGHTS, **options}
    report = dora_convert.merge(base.path, adapters, tmp_path / "out", **options)
    assert (report.verified.wrong_elements, report.verified.max_ulp) == (0, 0)
    told = json.loads(json.dumps(report.to_dict()))
    assert (told["method"], told["weights"]) == (options["method"], list(WEIGHTS))
    assert told["density"] == [options["density"]] * 3 if "density" in options else told["density"] == []
    close(load(tmp_path / "out"), combined(case, oracle))
    checked = dora_convert.verify(base.path, adapters, tmp_path / "out")
    assert checked.verdict == "agree"
    again = dora_convert.verify(base.path, adapters, tmp_path / "out", **options)
    assert again.verdict == "agree"
    if "density" in options:
        other = dora_convert.verify(base.path, adapters, tmp_path / "out", **options | {"density": 0.9})
        assert other.verdict == "differ"


@pytest.mark.parametrize("method", ["dare", "dare-ties", "della", "ties", "chain"])
def test_bytes_depend_on_the_seed_alone(case, tmp_path, method):
    """Workers, memory and interruption change nothing; another seed does, and verify knows it."""
    _, base, adapters, _ = case
    options = {"method": method} | ({} if method == "chain" else {"density": [0.5, 0.3, 0.8]})
    merge = dora_convert.merge
    one = merge(base.path, adapters, tmp_path / "one", workers=1, **options)
    assert one.verified.wrong_elements == 0
    merge(base.path, adapters, tmp_path / "many", workers=4, max_memory="8MiB", **options)
    with stopped(2):
        merge(base.path, adapters, tmp_path / "again", workers=1, **options)
    assert merge(base.path, adapters, tmp_path / "again", **options).resumed
    assert contents(tmp_path / "one") == contents(tmp_path / "many") == contents(tmp_path / "again")
    assert dora_convert.verify(base.path, adapters, tmp_path / "one").verdict == "agree"
    if method in ("dare", "dare-ties", "della"):
        merge(base.path, adapters, tmp_path / "other", seed=1, **options)
        assert contents(tmp_path / "other") != contents(tmp_path / "one")
        assert dora_convert.verify(base.path, adapters, tmp_path / "other").verdict == "agree"
        wrong = dora_convert.verify(base.path, adapters, tmp_path / "other", seed=2, **options)
        assert wrong.verdict == "differ"


def test_dare_is_right_on_average(case, tmp_path):
    """Over seeds, of one adapter: the mean is the change, the variance Δ²(1 − p)/p."""
    _, base, adapters, changes = case
    drawn = []
    for seed in range(40):
        dora_convert.merge(
            base.path,
            adapters[0],
            tmp_path / f"{seed}",
            method="dare",
            density=0.5,
            seed=seed,
            undo="none",
            verify=False,
        )
        drawn.append(load(tmp_path / f"{seed}")[UP] - base.tensors[UP])
    change, drawn = changes[0][UP], torch.stack(drawn).double()
    assert (drawn.mean(0) - change).norm() / change.norm() == pytest.approx(40**-0.5, rel=0.1)
    assert float(drawn.var(0).sum() / change.square().sum()) == pytest.approx(1, rel=0.05)
    assert ((drawn.abs() < 1e-6) | ((drawn - 2 * change).abs() < 1e-6)).all()


def test_thresholds_of_many_blocks(case, tmp_path, monkeypatch):
    """Tensors of many blocks, more elements than are collected at once, and a self-check that believes thresholds."""
    monkeypatch.setattr("dora_convert.storage.reader.BLOCK_ELEMENTS", 160)
    monkeypatch.setattr("dora_convert.storage.reader.ROWS_MULTIPLE", 1)
    monkeypatch.setattr("dora_convert.engine.thresholds.COLLECTED", 300)
    monkeypatch.setattr("dora_convert.parity.combined.FEW_ELEMENTS", 100)
    _, base, adapters, _ = case
    report = dora_convert.merge(base.path, adapters, tmp_path / "out", method="ties", weight=WEIGHTS, density=0.4)
    assert report.verified.wrong_elements == 0
    close(load(tmp_path / "out"), combined(case, ORACLES["ties"][0]))


def test_claimed_thresholds_are_doubted(case, tmp_path, monkeypatch):
    """A merge that keeps too few elements, and says so, is found out: the sample keeps another share than asked for."""
    monkeypatch.setattr("dora_convert.parity.combined.FEW_ELEMENTS", 100)
    find = Thresholds.find
    monkeypatch.setattr(Thresholds, "find", lambda self: [(3 * least, last) for least, last in find(self)])
    _, base, adapters, _ = case
    with pytest.raises(VerificationError):
        dora_convert.merge(base.path, adapters, tmp_path / "out", method="ties", weight=WEIGHTS, density=0.4)


def test_two_ways_to_a_threshold(case, tmp_path, monkeypatch):
    """The quick search and the exact one keep the same elements, also of rows that nearly cancel in V = W + s·BA."""
    _, base, adapters, _ = case
    written, calls = [], []
    for kept in (1 << 18, 300):  # all numbers are held, or only those near the threshold
        monkeypatch.setattr("dora_convert.engine.thresholds.COLLECTED", kept)
        monkeypatch.setattr("dora_convert.engine.quick_thresholds.CANCELLED", 1.0 if kept == 300 else 0.0)
        found = QuickThresholds.find
        monkeypatch.setattr(QuickThresholds, "find", lambda *a, f=found: calls.append(f(*a)) or calls[-1])
        out = tmp_path / str(kept)
        dora_convert.merge(base.path, adapters, out, method="ties", weight=WEIGHTS, density=0.4)
        written.append(load(out))
    assert sum(map(len, calls)) > 5
    assert all(torch.equal(written[0][name], x) for name, x in written[1].items())


@pytest.mark.parametrize("method", ["ties", "ties by frequency", "magnitude-prune"])
def test_float32_rounds_as_float64(case, tmp_path, monkeypatch, method):
    """Blocks have the same bytes in float32 with few doubts, with doubts everywhere, not compiled, and in float64."""
    monkeypatch.setattr("dora_convert.engine.thresholds.COLLECTED", 300)
    monkeypatch.setattr("dora_convert.engine.quick_combine.MOST_DOUBTFUL", 1.0)
    _, base, adapters, _ = case
    options = {**ORACLES[method][1], "method": method.split()[0], "weight": WEIGHTS, "dtype": "bfloat16"}
    rounded, blocks, written = QuickCombiner.rounded, [], []
    steps = (combine_block, exact_elements, count_block, norms_of_block, sample_of_block)
    assert all(step.compiles for step in steps)
    steps = {step: step._compiled for step in steps}
    for slack, quick, plain in ((8, True, False), (1 << 20, True, False), (8, True, True), (8, False, False)):
        monkeypatch.setattr("dora_convert.engine.quick_combine.SLACK", slack)
        for step, compiled in steps.items():
            monkeypatch.setattr(step, "_compiled", step.plain if plain else compiled)
        monkeypatch.setattr(
            QuickCombiner, "rounded", lambda *a, q=quick: blocks.append(rounded(*a) if q else None) or blocks[-1]
        )
        out = tmp_path / f"{len(written)}"
        dora_convert.merge(base.path, adapters, out, **options)
        written.append(load(out))
    assert sum(block is not None for block in blocks) > 5
    assert all(torch.equal(written[3][name], x) for each in written[:3] for name, x in each.items())


def test_equal_magnitudes_are_kept_in_order(tmp_path):
    """Full checkpoints on a grid: exactly as many as the density says, the first of equals first; verify agrees."""
    base = make_base(tmp_path / "base", torch.float32, layers=1)
    torch.manual_seed(5)
    steps = torch.randint(-3, 4, base.tensors[UP].shape).float() / 8
    tuned = tmp_path / "tuned"
    grid = base.tensors | {UP: base.tensors[UP].mul(64).round().div(64)}
    write_base(tmp_path / "grid", base, grid)
    write_base(tuned, base, grid | {UP: grid[UP] + steps})
    out = dora_convert.merge(tmp_path / "grid", tuned, tmp_path / "out", method="magnitude-prune", density=0.5).out
    got = (load(tmp_path / "out")[UP] - grid[UP]).flatten()
    order = steps.abs().flatten().sort(descending=True, stable=True).indices
    want = torch.zeros_like(got)
    chosen = order[: steps.numel() // 2]
    want[chosen] = steps.flatten()[chosen]
    assert torch.equal(got, want)
    assert dora_convert.verify(tmp_path / "grid", tuned, out).verdict == "agree"


def write_base(path, base, tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text((base.path / "config.json").read_text())


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_full_checkpoints(tmp_path, method):
    """Task vectors of checkpoints, every floating tensor of them, and of an adapter beside them."""
    base = make_base(tmp_path / "base", torch.float32, layers=1)
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    torch.manual_seed(6)
    tuned = [{name: x + torch.randn_like(x) * 0.02 for name, x in base.tensors.items()} for _ in range(2)]
    for number, tensors in enumerate(tuned):
        write_base(tmp_path / f"tuned{number}", base, tensors)
    inputs = [tmp_path / "tuned0", adapter, tmp_path / "tuned1"]
    options = {"weight": WEIGHTS, "method": method} | ({"density": 0.5} if method == "ties" else {})
    dora_convert.merge(base.path, inputs, tmp_path / "out", **options)
    merged, got = exact(base, adapter), load(tmp_path / "out")
    for name, x in base.tensors.items():
        deltas = [each[name].double() - x.double() for each in (tuned[0], merged, tuned[1])]
        weights = torch.tensor(WEIGHTS).double()
        if name not in merged or not deltas[1].any():
            deltas, weights = [deltas[0], deltas[2]], weights[[0, 2]]
        change = (
            merge_utils.ties(deltas, weights, 0.5) if method == "ties" else merge_utils.task_arithmetic(deltas, weights)
        )
        torch.testing.assert_close(got[name].double(), x.double() + change, rtol=0, atol=3e-7)
    assert dora_convert.verify(base.path, inputs, tmp_path / "out").verdict == "agree"
    with pytest.raises(RefError, match="tuned0'  is a model, not an adapter"):
        dora_convert.merge(base.path, inputs, tmp_path / "chain", method="chain")


@pytest.mark.parametrize("method", ["chain", "ties", "dare", "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_exact_records_take_every_method_out(tmp_path, method, dtype):
    """Bit for bit; of three adapters, one of which replaces a module."""
    base = make_base(tmp_path / "base", dtype, layers=1)
    head = {"base_model.model.lm_head.weight": torch.ones(base.tensors["lm_head.weight"].shape)}
    adapters = [
        make_adapter(tmp_path / "a", base, dora=True, seed=2),
        make_adapter(tmp_path / "b", base, dora=False, seed=3),
        make_adapter(tmp_path / "c", base, dora=True, seed=4, modules_to_save=["lm_head"], extra=head),
    ]
    options = {"method": method} | ({} if method in ("chain", "linear") else {"density": 0.4})
    dora_convert.merge(base.path, adapters, tmp_path / "merged", undo="exact", **options)
    report = dora_convert.unmerge(tmp_path / "merged", adapters, tmp_path / "again")
    assert report.exact["tensors"] == report.exact["bit_exact"] > 0
    again = load(tmp_path / "again")
    assert all(torch.equal(again[name], x) for name, x in base.tensors.items())


def test_a_chain_has_an_inverse_and_ties_has_none(case, tmp_path):
    """Without an exact record: the chain comes back up to rounding; what cannot be inverted is said beforehand."""
    _, base, adapters, _ = case
    dora_convert.merge(base.path, adapters, tmp_path / "chain", method="chain", weight=WEIGHTS)
    dora_convert.unmerge(tmp_path / "chain", adapters, tmp_path / "again")
    close(load(tmp_path / "again"), base.tensors)
    report = dora_convert.merge(base.path, adapters, tmp_path / "ties", method="ties", density=0.5)
    assert any("unmerge needs them" in text for text in report.warnings), report.warnings
    with pytest.raises(UnsupportedError) as caught:
        dora_convert.unmerge(tmp_path / "ties", adapters, tmp_path / "out")
    assert "which cannot be inverted" in caught.value.text()
    with pytest.raises(UsageError, match="name all adapters"):
        dora_convert.unmerge(tmp_path / "ties", adapters[:1], tmp_path / "out")


def test_the_same_bytes_are_no_conflict(tmp_path):
    """Two adapters that bring the same head agree; with other values both are named, and three ways out."""
    base = make_base(tmp_path / "base", torch.float32, layers=1)
    shape, adapters = base.tensors["lm_head.weight"].shape, []
    for seed, value in enumerate((1.0, 1.0, 2.0)):
        head = {"base_model.model.lm_head.weight": torch.full(shape, value)}
        path = tmp_path / f"a{seed}"
        adapters.append(make_adapter(path, base, dora=True, seed=seed, modules_to_save=["lm_head"], extra=head))
    dora_convert.merge(base.path, adapters[:2], tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")["lm_head.weight"], torch.ones(shape))
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(base.path, adapters[1:], tmp_path / "no")
    assert "a1 and a2 both replace lm_head.weight" in caught.value.text()
    report = dora_convert.merge(base.path, adapters[1:], tmp_path / "chain", method="chain")
    assert torch.equal(load(tmp_path / "chain")["lm_head.weight"], torch.full(shape, 2.0))
    assert any("a2 replaces lm_head.weight" in text for text in report.warnings)
    dora_convert.merge(base.path, adapters[1:], tmp_path / "linear", method="linear", weight=[0.5, 0.25])
    want = base.tensors["lm_head.weight"] * 0.25 + 0.5 + 0.5
    torch.testing.assert_close(load(tmp_path / "linear")["lm_head.weight"], want)


def test_options_are_checked(case, tmp_path):
    """Densities that are missing, too many or no shares; options that change nothing are said."""
    _, base, adapters, _ = case

    def merge(**options):
        return dora_convert.merge(base.path, adapters, tmp_path / "out", dry_run=True, **options)

    for options, words in (
        ({"method": "ties"}, "needs"),
        ({"method": "ties", "density": [0.5, 0.5]}, "2 .* for 3 adapters"),
        ({"method": "dare", "density": 0}, "above 0"),
        ({"method": "dare", "density": 1.5}, "at most 1"),
        ({"method": "mean", "density": 0.5}, "not one of"),
    ):
        with pytest.raises(UsageError, match=words):
            merge(**options)
    report = merge(method="linear", density=0.5, seed=3, majority_sign="frequency")
    assert sum("changes nothing" in text for text in report.warnings) == 3


def test_the_command_of_the_card_repeats_the_merge(case, tmp_path, capsys):
    """Method and options are in the card and in verify's notice; the command line takes them."""
    _, base, adapters, _ = case
    words = ["--method", "dare-ties", "--density", "0.5", "--density", "0.25", "--density", "1", "--seed", "4"]
    words += ["--majority-sign", "frequency"]
    with pytest.raises(SystemExit) as end:
        main(["merge", str(base.path), *map(str, adapters), str(tmp_path / "out"), *words])
    assert not end.value.code
    card = (tmp_path / "out" / "README.md").read_text()
    options = "--method dare-ties --density 0.5 --density 0.25 --density 1.0 --seed 4 --majority-sign frequency"
    assert options in " ".join(card.split())
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["verify", str(base.path), *map(str, adapters), str(tmp_path / "out")])
    assert not end.value.code
    assert options in " ".join(capsys.readouterr().err.split())


def test_checkpoints_with_one_embedding(tmp_path):
    """A tied embedding stays one weight, and is combined as one."""
    torch.manual_seed(7)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    models = [LlamaForCausalLM(config) for _ in range(3)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    inputs = [tmp_path / "1", tmp_path / "2"]
    dora_convert.merge(tmp_path / "0", inputs, tmp_path / "out", method="linear", weight=[0.5, 0.25])
    base, *tuned = (model.state_dict() for model in models)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings
    assert "lm_head.weight" not in load(tmp_path / "out")
    for name, x in merged.state_dict().items():
        want = base[name] * 0.25 + tuned[0][name] * 0.5 + tuned[1][name] * 0.25
        torch.testing.assert_close(x, want, rtol=0, atol=1e-6)
    assert dora_convert.verify(tmp_path / "0", inputs, tmp_path / "out").verdict == "agree"
