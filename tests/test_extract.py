"""extract: an adapter of a fine-tuned checkpoint, which PEFT loads and which merges to what was fine-tuned."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import dora_convert
from dora_convert.errors import DoraConvertError, PlanError, UsageError

from . import toy
from .commands import exit_code
from .peft_cases import GROWN, IDS, SIZES, Case, Tiny, bert, distance, gpt2, llama, outputs, save, scrambled, start, t5
from .test_from_lora import TIED
from .test_peft_matrix import noisy

LINEAR = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight")


def tune(base: toy.Base, path, changed: dict[str, torch.Tensor]):
    """A copy of a base with some tensors replaced, in one file."""
    shutil.copytree(base.path, path, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: changed.get(name, tensor).contiguous() for name, tensor in base.tensors.items()}
    toy.write_shards(path, tensors | changed, 1)
    return path


@pytest.fixture
def single(tmp_path):
    """A base in float32."""
    return toy.make_base(tmp_path / "base", torch.float32)


def test_a_merged_dora_is_found_again(tmp_path, single):
    """Of a true DoRA in float32, m, B and A are recovered: what it merges to is TUNED to 1e-6, and a LoRA is far off."""
    adapter = toy.make_adapter(tmp_path / "dora", single, dora=True)
    dora_convert.merge(single.path, adapter, tmp_path / "tuned")
    report = dora_convert.extract(single.path, tmp_path / "tuned", tmp_path / "out", rank=toy.RANK)
    dora_convert.merge(single.path, tmp_path / "out", tmp_path / "again")
    again, tuned = toy.load(tmp_path / "again"), toy.load(tmp_path / "tuned")
    assert len(report.modules) == 6
    for module in report.modules:
        assert module.rank == toy.RANK
        assert float((again[module.name] - tuned[module.name]).norm() / tuned[module.name].norm()) < 1e-6
        assert module.relative_error < 1e-5
        assert module.details["converged"]
        assert module.details["lora_error"] > 1000 * module.relative_error
    assert report.details["lora_error"] > 0.01
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["use_dora"]
    assert config["target_modules"] == ["down_proj", "k_proj", "up_proj"]
    assert config["modules_to_save"] is None


def test_a_lora_is_the_best_there_is(tmp_path, single):
    """Each module's error is that of the truncated SVD (Eckart and Young), and the untouched are not targeted."""
    torch.manual_seed(4)
    changed = {name: single.tensors[name] + 0.01 * torch.randn(single.tensors[name].shape) for name in LINEAR}
    tuned = tune(single, tmp_path / "tuned", changed)
    report = dora_convert.extract(single.path, tuned, tmp_path / "out", kind="lora", rank=5)
    assert {module.name for module in report.modules} == set(LINEAR)
    for module in report.modules:
        D = changed[module.name].double() - single.tensors[module.name].double()
        values = torch.linalg.svdvals(D)
        best = float(values[5:].norm() / values.norm())
        assert module.relative_error == pytest.approx(best, rel=1e-2)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(name.removesuffix(".weight") for name in LINEAR)
    dora_convert.merge(single.path, tmp_path / "out", tmp_path / "merged")
    merged = toy.load(tmp_path / "merged")
    for module in report.modules:
        D = changed[module.name] - single.tensors[module.name]
        error = (merged[module.name] - changed[module.name]).norm() / D.norm()
        assert float(error) == pytest.approx(module.relative_error, rel=1e-3)


def test_half_precision_is_subtracted_in_full(tmp_path, base):
    """Of bf16 checkpoints, ΔW is exact: at full rank the adapter merges to TUNED's very bytes."""
    torch.manual_seed(4)
    changed = {
        name: (base.tensors[name].float() * (1 + 0.05 * torch.randn(base.tensors[name].shape))).bfloat16()
        for name in LINEAR
    }
    tuned = tune(base, tmp_path / "tuned", changed)
    dora_convert.extract(base.path, tuned, tmp_path / "out", kind="lora", rank=99)
    dora_convert.merge(base.path, tmp_path / "out", tmp_path / "merged")
    for name, tensor in toy.load(tmp_path / "merged").items():
        assert torch.equal(tensor, changed.get(name, base.tensors[name])), name


MODELS = {
    "llama": (llama(), IDS),
    "tied llama": (TIED, IDS),
    "gpt2": (gpt2(), IDS),
    "bert": (bert("BertForMaskedLM"), IDS),
}


@torch.no_grad()
def finetuned(model, folder, *, grow: bool = False):
    """A model with every parameter moved a little, saved."""
    torch.manual_seed(7)
    if grow:
        model.resize_token_embeddings(75, mean_resizing=False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.03)
    save(model, folder)
    return model


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_everything_changed(tmp_path, name, kind):
    """Of a full fine-tune, at full rank, PEFT's outputs and our merge's are TUNED's; norms and biases are saved whole."""
    base, inputs = MODELS[name]
    case = Case(base, lambda: None, inputs=inputs)
    torch.manual_seed(3)
    with noisy():
        save(base(), tmp_path / "base")
        want = outputs(finetuned(start(case, tmp_path / "base"), tmp_path / "tuned"), inputs)
        report = dora_convert.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", kind=kind, rank=99)
        made = PeftModel.from_pretrained(start(case, tmp_path / "base"), tmp_path / "out").eval()
        assert distance(outputs(made, inputs), want) <= 1e-4
        dora_convert.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
        assert distance(outputs(start(case, tmp_path / "merged"), inputs), want) <= 1e-4
        before = outputs(start(case, tmp_path / "base"), inputs)
        assert distance(before, want) > 0.02
    assert report.details["saved_whole"]
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    wanted = {key.replace(".default", "").replace("vector.weight", "vector") for key in made.state_dict()}
    wanted = {key.replace(".modules_to_save", "") for key in wanted}
    assert stored.keys() <= wanted


def test_a_grown_vocabulary(tmp_path):
    """An embedding and a head with more rows are saved whole, even with --embeddings lora; our merge is TUNED."""
    case = Case(llama(), lambda: None, inputs=GROWN)
    torch.manual_seed(3)
    with noisy():
        save(llama()(), tmp_path / "base")
        tuned = finetuned(start(case, tmp_path / "base"), tmp_path / "tuned", grow=True)
        want = outputs(tuned, GROWN)
        report = dora_convert.extract(
            tmp_path / "base", tmp_path / "tuned", tmp_path / "out", kind="lora", rank=99, embeddings="lora"
        )
        dora_convert.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
        assert distance(outputs(start(case, tmp_path / "merged"), GROWN), want) <= 1e-4
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(report.details["saved_whole"])
    with pytest.raises(PlanError, match="no place in an adapter") as caught:
        dora_convert.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "no", rank=9, embeddings="skip")
    assert {fault.what for fault in caught.value.faults} == {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize("embeddings", ["full", "lora", "skip"])
def test_embeddings(tmp_path, embeddings):
    """full: whole; lora: factors, the embedding's under its own names; skip: left out with the norms, and listed."""
    case = Case(llama(), lambda: None)
    torch.manual_seed(3)
    with noisy():
        save(llama()(), tmp_path / "base")
        want = outputs(finetuned(start(case, tmp_path / "base"), tmp_path / "tuned"), IDS)
        report = dora_convert.extract(
            tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=99, kind="lora", embeddings=embeddings
        )
        made = PeftModel.from_pretrained(start(case, tmp_path / "base"), tmp_path / "out").eval()
        apart = distance(outputs(made, IDS), want)
    names = load_file(tmp_path / "out/adapter_model.safetensors").keys()
    assert any("lora_embedding_A" in name for name in names) == (embeddings == "lora")
    assert any("norm" in name for name in names) == (embeddings != "skip")
    assert ("model.norm.weight" in report.details["skipped"]) == (embeddings == "skip")
    assert apart > 1e-2 if embeddings == "skip" else apart < 1e-4


def test_a_tied_embedding_as_factors_is_refused(tmp_path):
    """PEFT would add such factors twice when it merges: the error names the tensor and the ways out."""
    case = Case(TIED, lambda: None)
    with noisy():
        save(TIED(), tmp_path / "base")
        finetuned(start(case, tmp_path / "base"), tmp_path / "tuned")
    with pytest.raises(PlanError) as caught:
        dora_convert.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=9, embeddings="lora")
    assert "embeddings='full'" in caught.value.text()
    assert not list(tmp_path.glob("out*"))


def test_a_new_head(tmp_path):
    """A classifier that BASE lacks is saved whole, and PEFT opens the adapter on the model that has one."""
    case = Case(llama(), lambda: None, opened="LlamaForSequenceClassification", labels=3)
    torch.manual_seed(3)
    with noisy():
        save(llama()(), tmp_path / "causal")
        model = scrambled(start(case, tmp_path / "causal"))
        want = outputs(finetuned(model, tmp_path / "tuned"), IDS)
        dora_convert.extract(tmp_path / "causal", tmp_path / "tuned", tmp_path / "out", rank=99, kind="lora")
        made = PeftModel.from_pretrained(start(case, tmp_path / "causal"), tmp_path / "out").eval()
        assert distance(outputs(made, IDS), want) <= 1e-4
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


SMALL = {"vocab_size": 70, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 56, "initializer_range": 0.1}
ROBERTA = {**SIZES, "intermediate_size": 56, "max_position_embeddings": 20}


@pytest.mark.parametrize(
    ("base", "opened", "task", "head"),
    [
        (Tiny("RobertaForMaskedLM", ROBERTA), "RobertaForSequenceClassification", "SEQ_CLS", ["classifier"]),
        (Tiny("DistilBertForMaskedLM", SMALL), "DistilBertForSequenceClassification", "SEQ_CLS", ["classifier", "pre_classifier"]),
        (bert("BertForMaskedLM"), "BertForTokenClassification", "TOKEN_CLS", ["classifier"]),
        (bert("BertForSequenceClassification"), "BertForSequenceClassification", None, []),
        (Tiny("RobertaForTokenClassification", ROBERTA), "RobertaForTokenClassification", None, []),
    ],
)  # fmt: skip
def test_heads_of_encoders(tmp_path, base, opened, task, head):
    """A new head in the place of another is one module that PEFT's task names; one that has factors gets no task."""
    case = Case(base, lambda: None, opened=opened)
    torch.manual_seed(3)
    with noisy():
        save(base(), tmp_path / "base")
        want = outputs(finetuned(scrambled(start(case, tmp_path / "base")), tmp_path / "tuned"), IDS)
        dora_convert.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=99, kind="lora")
        made = PeftModel.from_pretrained(start(case, tmp_path / "base"), tmp_path / "out").eval()
        assert distance(outputs(made, IDS), want) <= 1e-5
        dora_convert.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
        assert distance(outputs(start(case, tmp_path / "merged"), IDS), want) <= 1e-5
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["task_type"] == task
    assert [name for name in config["modules_to_save"] if "classifier" in name] == head
    assert json.loads((tmp_path / "merged/config.json").read_text())["architectures"] == [opened]


def test_an_embedding_tied_to_more_than_a_head(tmp_path):
    """T5's serves two stacks and the head: PEFT loads no adapter that saves it, so it is refused, with the way out."""
    with noisy():
        save(t5(), tmp_path / "base")
        finetuned(start(Case(t5, lambda: None), tmp_path / "base"), tmp_path / "tuned")
    for embeddings in ("full", "lora"):
        with pytest.raises(PlanError) as caught:
            dora_convert.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=9, embeddings=embeddings)
        assert [fault.what for fault in caught.value.faults] == ["shared.weight"]
        assert "embeddings='skip'" in caught.value.text()
        assert "embeddings='full'" not in caught.value.text()
    dora_convert.extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=9, kind="lora", embeddings="skip"
    )


class Nested(nn.Module):
    """Modules whose names are ends of each other's."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.ModuleDict({"linear": nn.Linear(11, 5)})
        self.linear, self.block = nn.Linear(7, 9), nn.ModuleDict({"linear": nn.Linear(9, 11), "block": inner})

    def forward(self, x):
        return self.block["block"]["linear"](self.block["linear"](self.linear(x)))


@pytest.mark.parametrize("changed", ["linear", "block.linear", "block.block.linear"])
def test_names_that_end_alike(tmp_path, changed):
    """PEFT puts factors on the module that differs and on no other one, though its name is an end of theirs."""
    torch.manual_seed(3)
    model = Nested()
    save(model, tmp_path / "base")
    with torch.no_grad():
        weight = model.get_submodule(changed).weight
        weight += torch.randn_like(weight)
    save(model, tmp_path / "tuned")
    for kind in ("lora", "dora"):
        dora_convert.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / kind, rank=99, kind=kind)
        base = Nested()
        base.load_state_dict(load_file(tmp_path / "base/model.safetensors"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = PeftModel.from_pretrained(base, tmp_path / kind)
        found = {name.partition(".lora_A")[0] for name in made.state_dict() if ".lora_A" in name}
        assert found == {f"base_model.model.{changed}"}
        x = torch.randn(3, 7)
        assert torch.allclose(made(x), model(x), rtol=1e-4, atol=1e-5)
        dora_convert.merge(tmp_path / "base", tmp_path / kind, tmp_path / f"{kind} merged")


def test_bad_input_is_named(tmp_path, single):
    """No goal, the same checkpoint twice, other shapes, NaN, no factors, an adapter as TUNED: nothing is written."""
    nan = single.tensors[LINEAR[0]].clone()
    nan[3, 4] = float("nan")
    wrong = {
        "other": {LINEAR[0]: torch.randn(17, 40)},
        "damaged": {LINEAR[0]: nan},
        "norm": {LINEAR[0]: single.tensors[LINEAR[0]] + 1, "model.norm.weight": torch.full((40,), torch.inf)},
        "whole": {"model.norm.weight": torch.randn(40)},
    }
    for name, changed in wrong.items():
        tune(single, tmp_path / name, changed)
    adapter = toy.make_adapter(tmp_path / "adapter", single, dora=True)
    words = {
        "other": LINEAR[0], "damaged": "NaN", "norm": "model.norm.weight", "base": "Nothing to extract",
        "whole": "no adapter without factors", "adapter": "is an adapter, not a model",
    }  # fmt: skip
    for tuned, word in words.items():
        with pytest.raises(DoraConvertError) as caught:
            dora_convert.extract(single.path, tmp_path / tuned, tmp_path / "out", rank=4)
        assert word in caught.value.text(), tuned
    with pytest.raises(UsageError):
        dora_convert.extract(single.path, adapter, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_command_line(tmp_path, single, capsys):
    """The JSON has the fields of the contract; a dry run works from headers and says what may be saved."""
    torch.manual_seed(4)
    changed = {LINEAR[0]: single.tensors[LINEAR[0]] + 0.01, "model.norm.weight": torch.randn(toy.HIDDEN)}
    tuned = tune(single, tmp_path / "tuned", changed)
    words = ["extract", single.path, tuned, tmp_path / "out", "--kind", "dora", "--max-error", 0.5]
    assert exit_code(*words, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert LINEAR[0] in plan["modules"]
    assert plan["least_memory"] > 4 * 96 * 40
    assert exit_code(*words, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["command"], report["kind"], report["saved_whole"]) == ("extract", "dora", ["model.norm.weight"])
    assert report["modules"][0].keys() >= {"name", "rank", "relative_error", "lora_error", "converged"}
    assert exit_code(*words[:-2], "--overwrite") == 2
    assert "--rank 32" in capsys.readouterr().err
    assert exit_code(*words, "--overwrite") == 0
    assert "LoRA's error" in capsys.readouterr().out
    card = (tmp_path / "out/README.md").read_text()
    assert str(tmp_path) not in card
