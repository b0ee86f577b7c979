"""verify: what honest merges of anybody look like, and what each kind of wrong merge is called."""

from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import dora_convert
from dora_convert.errors import DoraConvertError

from . import toy
from .test_against_peft import TARGETS as KINDS
from .test_against_peft import VARIANTS, trained
from .test_cli import run  # noqa: F401 - a fixture
from .test_kinds import EMBEDDING, head, tied, tokens  # noqa: F401 - `tied` is a fixture
from .toy import ALPHA, SHAPES, Base, contents, edit_json, load, make_adapter

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RANK, S = 3, 2.0  # alpha/r = 2, alpha/√r = 3.46, alpha = 6: no cause looks like another
SQUARE, WIDE = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
NORM, HEAD = "model.norm.weight", "lm_head.weight"
SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
PLAIN = {"targets": ("k_proj",), "dora": False}


def agrees(base, adapters, out, **options):
    """The report of a merge in which nothing is wrong; no input changes while it is made."""
    before = contents(out)
    report = dora_convert.verify(base, adapters, out, **options)
    assert (report.verdict, report.problems) == ("agree", ())
    assert contents(out) == before
    assert all(module.wrong_elements == 0 < module.elements for module in report.modules)
    counts = report.to_dict()["untouched"]
    assert counts["tensors"] == counts["identical"]
    return report


def differs(base, adapters, out, name="", word="", **options):
    """The report of a wrong merge, of which one problem holds both a name and a word."""
    report = dora_convert.verify(base, adapters, out, **options)
    assert report.verdict == "differ"
    assert any(name in text and re.search(word, text, re.I) for text in report.problems), report.problems
    return report


def tamper(out, changes):
    """Write other tensors into the shards where they lie; None drops one, an unknown name is added."""
    index, tensors = json.loads((out / INDEX).read_text()), load(out)
    for name, value in changes.items():
        file = index["weight_map"].pop(name, SHARD)
        shard = load_file(out / file)
        old = shard.pop(name, None)
        assert (value is not None or old is not None) and not (  # noqa: PT018
            value is not None and old is not None and value.shape == old.shape and torch.equal(value, old)
        ), f"{name} does not change"
        if value is not None:
            shard[name], index["weight_map"][name] = value.contiguous(), file
            tensors[name] = value
        else:
            del tensors[name]
        save_file(shard, out / file, {"format": "pt"})
    index["metadata"]["total_size"] = sum(tensor.nbytes for tensor in tensors.values())
    toy.write_json(out / INDEX, index)


def moved(tensor, ulps, at):
    """A tensor of which one element is some neighbours away."""
    bits = tensor.clone().view(torch.int16)
    bits.view(-1)[at] += ulps
    return bits.view(tensor.dtype)


def merged(tmp_path, *, dora=True, dtype=BF16):
    """BASE, ADAPTER and a correct MERGED, with square and other modules."""
    base = toy.make_base(tmp_path / "base", dtype)
    edit_json(base.path / "config.json", vocab_size=72, num_hidden_layers=2, transformers_version="4.1")
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora, targets=tuple(SHAPES), rank=RANK)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    return base.path, adapter, tmp_path / "out"


def parts(base, adapter):
    """The name of each adapted weight, and W, BA and m in float64."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in load(base).items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(SHAPES)):
            m = tensors.get(f"base_model.model.{module}.lora_magnitude_vector")
            yield name, weight.double(), toy.low_rank(tensors, module), m if m is None else m.double()


def grown(V, m):
    return V if m is None else V * (m / V.norm(dim=1))[:, None]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("dora", [True, False])
def test_our_own_merge_agrees(tmp_path, dtype, dora):
    base, adapter, out = merged(tmp_path, dora=dora, dtype=dtype)
    report = agrees(base, adapter, out)
    assert {module.name for module in report.modules} == {name for name, *_ in parts(base, adapter)}
    for module in report.modules:
        assert module.max_ulp <= (0 if dtype != FP32 else 1)
        assert 0 < module.output_error <= 1.01 * module.output_floor + 1e-12
    assert report.to_dict()["untouched"]["tensors"] == 5
    options = {"max_shard_size": "9KB"}, {"dtype": "float32"}, {"compute_dtype": "float32"}, {"undo": "none"}
    for number, option in enumerate(options):
        dora_convert.merge(base, adapter, tmp_path / f"out{number}", **option)
        agrees(base, adapter, tmp_path / f"out{number}", samples=number + 1)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_kind_agrees(tmp_path, dtype, variant):
    """Conv1D, convolutions, embeddings, saved modules: as this package and as PEFT's two ways merge them."""
    config = LoraConfig(r=4, target_modules=KINDS, **{"lora_alpha": 6, **VARIANTS[variant]})
    model, _ = trained(dtype, config, tmp_path)
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    dora_convert.merge(base, adapter, out)
    agrees(base, adapter, out)
    for safe in (True, False):
        peft_model = PeftModel.from_pretrained(copy.deepcopy(model), adapter)
        state = peft_model.merge_and_unload(safe_merge=safe).state_dict()
        state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
        save_file(state, out / "model.safetensors", {"format": "pt"})
        agrees(base, adapter, out)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("dora", "tie"), [(True, False), (False, True)])
def test_a_llama_merged_by_others_agrees(tmp_path, dtype, dora, tie):
    """Saved by PEFT, with its own config and shards; and as axolotl does, which adds PEFT's difference once more."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=70, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=tie,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    base = Base(tmp_path / "base", load(tmp_path / "base"))
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora, targets=targets)
    for safe in (True, False):
        model = LlamaForCausalLM.from_pretrained(base.path, dtype=dtype)
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=safe)
        model.save_pretrained(tmp_path / f"peft{safe}")
        assert len(agrees(base.path, adapter, tmp_path / f"peft{safe}").modules) == 14
    shutil.copytree(base.path, tmp_path / "axolotl")
    for file in base.path.glob("*.safetensors"):
        shard, plus = load_file(file), load(tmp_path / "peftFalse")
        shard = {name: (W.float() + (plus[name] - W).float()).to(dtype) for name, W in shard.items()}
        save_file(shard, tmp_path / "axolotl" / file.name, {"format": "pt"})
    agrees(base.path, adapter, tmp_path / "axolotl")


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("dora", [True, False])
def test_two_roundings_agree(tmp_path, dora, dtype):
    """The delta, then the result: for DoRA the delta is what it grows by, as well."""
    base, adapter, out = merged(tmp_path, dora=dora, dtype=dtype)
    changes = {}
    for name, W, D, m in parts(base, adapter):
        V = W.float() + (S * D).to(dtype).float()
        late = grown((W + S * D).float(), m.float()).to(dtype) - W.to(dtype) if dora else None
        changes[name] = (V if late is None else W.float() + late.float()).to(dtype)
    tamper(out, changes)
    assert any(module.max_ulp > 0 for module in agrees(base, adapter, out).modules)
    if dora:
        tamper(out, {n: grown(W.float() + (S * D).to(dtype), m.float()).to(dtype)
                     for n, W, D, m in parts(base, adapter)})  # fmt: skip
        agrees(base, adapter, out)


def test_saved_modules_rows_and_ties(tmp_path, base, tied):  # noqa: F811
    """Replaced and added tensors and rows agree when they are as the adapter says, and not two ulps away."""
    saved = {"modules_to_save": ["lm_head"], "extra": {f"base_model.model.{HEAD}": torch.randn(72, 40)}}
    cases = [
        (base, make_adapter(tmp_path / "s", base, **saved, **PLAIN), HEAD, 3),
        (base, tokens(tmp_path, base, [5, 71, 0]), EMBEDDING, 71),
        (tied, tokens(tmp_path, tied, [5], "t"), EMBEDDING, 5),
        (tied, make_adapter(tmp_path / "u", tied, extra=head(), **PLAIN), HEAD, 0),
    ]
    for number, (on, adapter, name, row) in enumerate(cases):
        out = tmp_path / f"out{number}"
        dora_convert.merge(on.path, adapter, out)
        agrees(on.path, adapter, out)
        tamper(out, {name: moved(load(out)[name], 2, row * 40)})
        differs(on.path, adapter, out, name)


def test_two_adapters_agree_at_their_weights(tmp_path, base):
    paths = [make_adapter(tmp_path / f"a{k}", base, dora=k > 0, seed=k + 5) for k in range(2)]
    dora_convert.merge(base.path, paths, tmp_path / "out", weight=[0.5, -0.25])
    agrees(base.path, paths, tmp_path / "out", weight=[0.5, -0.25])
    differs(base.path, paths, tmp_path / "out", WIDE, weight=[0.5, 0.25])
    differs(base.path, paths, tmp_path / "out", WIDE)
    differs(base.path, paths[0], tmp_path / "out", WIDE)


CAUSES = {
    "lora alpha": (WIDE, "scaling", lambda W, D, _: W + ALPHA * D),
    "lora root": (WIDE, "scaling", lambda W, D, _: W + ALPHA / RANK**0.5 * D),
    "lora factor": (WIDE, "scaling", lambda W, D, _: W + 0.7 * D),
    "lora missing": (WIDE, "not merged", lambda W, *_: W),
    "lora twice": (WIDE, "twice", lambda W, D, _: W + 2 * S * D),
    "lora transposed": (SQUARE, "transposed", lambda W, D, _: W + S * D.T),
    "dora magnitude": (WIDE, "magnitude", lambda W, D, _: W + S * D),
    "dora alpha": (WIDE, "scaling", lambda W, D, m: grown(W + ALPHA * D, m)),
    "dora root": (WIDE, "scaling", lambda W, D, m: grown(W + ALPHA / RANK**0.5 * D, m)),
    "dora missing": (WIDE, "not merged", lambda W, *_: W),
    "dora twice": (WIDE, "twice", lambda W, D, m: grown(grown(W + S * D, m) + S * D, m)),
    "dora axis": (SQUARE, "axis", lambda W, D, m: grown((W + S * D).T, m).T),
    "dora transposed": (SQUARE, "transposed", lambda W, D, m: grown(W + S * D.T, m)),
}


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("cause", CAUSES)
def test_wrong_modules_are_named_with_the_cause(tmp_path, cause, everywhere):
    """In one module, and in every one that can have it; the others are not accused."""
    base, adapter, out = merged(tmp_path, dora=cause.startswith("dora"))
    target, word, wrong = CAUSES[cause]
    changes = {}
    for name, W, D, m in parts(base, adapter):
        if name == target or (everywhere and (target == WIDE or W.shape[0] == W.shape[1])):
            changes[name] = toy.rounded(wrong(W, D, m), BF16)
    tamper(out, changes)
    report = differs(base, adapter, out, "" if everywhere else target, word)
    assert {module.name for module in report.modules if module.wrong_elements} == changes.keys()
    assert all(any(name in text for text in report.problems) for name in changes)
    for module in report.modules:
        assert (module.output_error > 2 * module.output_floor) == (module.name in changes)
        assert module.name in changes or module.name not in " ".join(report.problems)


def test_another_base(tmp_path):
    """Merged well, and not into BASE: the untouched tensors tell."""
    base, adapter, out = merged(tmp_path)
    other = Base(base, {name: torch.randn(tensor.shape).bfloat16() for name, tensor in load(base).items()})
    tamper(out, {name: toy.rounded(x, BF16) for name, x in toy.exact(other, adapter, scale=S).items()})
    report = differs(base, adapter, out, word="(another|other|different) base")
    assert report.to_dict()["untouched"]["identical"] == 0
    assert all(module.wrong_elements for module in report.modules)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("dora", [True, False])
def test_one_element(tmp_path, dtype, dora):
    """One element two ulps away, in a tensor that was rounded once, wherever it lies."""
    base, adapter, out = merged(tmp_path, dora=dora, dtype=dtype)
    good = load(out)
    for name, at, ulps in ((WIDE, 0, 2), (WIDE, -1, -2), (SQUARE, 777, 2), (SQUARE, 40, 64)):
        tamper(out, {name: moved(good[name], ulps, at)})
        report = differs(base, adapter, out, name)
        assert [module.name for module in report.modules if module.wrong_elements] == [name]
        assert [(m.wrong_elements, m.max_ulp) for m in report.modules if m.name == name] == [(1, abs(ulps))]
        tamper(out, {name: good[name]})


def test_tensors_that_should_be_as_they_were(tmp_path):
    """A byte of an untouched tensor; a tensor too few, too many, of another shape, or NaN."""
    base, adapter, out = merged(tmp_path)
    good, nan = load(out), torch.full((1, 40), torch.nan, dtype=BF16)
    cases = [
        (NORM, moved(good[NORM], 1, 9)), (NORM, None), (WIDE, None), ("model.extra.weight", torch.ones(3)),
        (WIDE, good[WIDE].T), (WIDE, torch.cat([nan, good[WIDE][1:]])),
    ]  # fmt: skip
    for name, value in cases:
        tamper(out, {name: value})
        report = differs(base, adapter, out, name)
        assert name != NORM or value is None or report.to_dict()["untouched"] == {"tensors": 5, "identical": 4}
        tamper(out, {name: good.get(name)})
        agrees(base, adapter, out)


def test_config_and_side_files(tmp_path):
    """A key that changes loading or computing counts; versions, README, tokenizer and sharding do not."""
    base, adapter, out = merged(tmp_path)
    config = (out / "config.json").read_text()
    for key, value in {
        "vocab_size": 71, "num_hidden_layers": 3, "tie_word_embeddings": True, "hidden_size": 41,
        "architectures": ["LlamaModel"], "torch_dtype": "float16", "model_type": "mistral",
    }.items():  # fmt: skip
        edit_json(out / "config.json", **{key: value})
        differs(base, adapter, out, key.removeprefix("torch_"))
        (out / "config.json").write_text(config)
    edit_json(out / "config.json", transformers_version="5.0", _name_or_path="x", dtype="bfloat16")
    for name in ("README.md", "tokenizer_config.json", "tokenizer.json"):
        (out / name).write_text("{}")
    shutil.rmtree(out / "dora_convert")
    agrees(base, adapter, out)
    tensors = load(out)
    for file in out.glob("model*.safetensors*"):
        file.unlink()
    toy.write_shards(out, tensors, 1)
    agrees(base, adapter, out)


def test_ties_that_are_wrong(tmp_path, tied):  # noqa: F811
    """A head left tied that the adapter changed, an embedding changed with it, and a flag against the tensors."""
    adapter, good = make_adapter(tmp_path / "a", tied, extra=head(), **PLAIN), tmp_path / "good"
    dora_convert.merge(tied.path, adapter, good)
    wrong = load(good)[HEAD]
    changes = ({}, True), ({HEAD: None}, True), ({HEAD: None, EMBEDDING: wrong}, True), ({EMBEDDING: wrong}, False)
    for number, (change, tie) in enumerate(changes):
        out = shutil.copytree(good, tmp_path / f"out{number}")
        edit_json(out / "config.json", tie_word_embeddings=tie)
        tamper(out, change)
        differs(tied.path, adapter, out, *(("", r"\b(un)?tie") if tie else (EMBEDDING,)))
    plain = make_adapter(tmp_path / "p", tied, **PLAIN)
    dora_convert.merge(tied.path, plain, tmp_path / "kept")
    edit_json(tmp_path / "kept/config.json", tie_word_embeddings=False)
    differs(tied.path, plain, tmp_path / "kept", word="tie")


def renamed(adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace("up_proj", "new_proj"): x for name, x in load_file(path).items()}, path)


UNDECIDABLE = {
    "missing shard": lambda out, _: (out / SHARD).unlink(),
    "truncated shard": lambda out, _: (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-1]),
    "broken index": lambda out, _: (out / INDEX).write_text("{"),
    "other format": lambda out, _: [file.rename(f"{file}.gguf") for file in out.glob("model*")],
    "no such folder": lambda out, _: shutil.rmtree(out),
    "the adapter's folder": lambda out, adapter: [shutil.rmtree(out), shutil.copytree(adapter, out)],
    "another model's adapter": lambda _, adapter: renamed(adapter),
}


@pytest.mark.parametrize("case", UNDECIDABLE)
def test_undecidable(run, tmp_path, case):  # noqa: F811
    """What cannot be read or judged is an error, exit code 2, and never a difference."""
    base, adapter, out = merged(tmp_path)
    before = contents(tmp_path)
    UNDECIDABLE[case](out, adapter)
    assert contents(tmp_path) != before
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.verify(base, adapter, out)
    assert caught.value.exit_code == 2
    assert SHARD in caught.value.text() or "shard" not in case
    code, text, err = run("verify", base, adapter, out)
    assert (code, text, "\nError: " in f"\n{err}") == (2, "", True)
    code, text, err = run("verify", base, adapter, out, "--json", "-q")
    assert (code, text, bool(json.loads(err)["error"]["message"])) == (2, "", True)


def test_command_line(run, tmp_path):  # noqa: F811
    """Exit codes 0 and 1; a table, the document of the contract, or the verdict alone; --allow-unmatched."""
    base, adapter, out = merged(tmp_path)
    words = ("verify", base, adapter, out)
    code, text, _ = run(*words)
    assert (code, "agree" in text) == (0, True)
    assert run(*words, "--quiet") == (0, "agree\n", "")
    tamper(out, {SQUARE: moved(load(out)[SQUARE], 2, 5)})
    code, text, _ = run(*words)
    assert (code, "differ" in text, "layers.1.self_attn.q_proj" in text) == (1, True, True)
    assert run(*words, "-q") == (1, "differ\n", "")
    code, text, _ = run(*words, "--json", "--samples", 3)
    report = json.loads(text)
    assert (code, report["schema"], report["command"], report["verdict"]) == (1, 1, "verify", "differ")
    assert {"version", "seconds", "modules", "untouched", "problems"} <= report.keys()
    fields = {"name", "wrong_elements", "elements", "max_ulp", "output_error"}
    assert all(fields <= module.keys() for module in report["modules"])
    assert sum(module["wrong_elements"] for module in report["modules"]) == 1
    assert report["untouched"] == {"tensors": 5, "identical": 5}
    assert any(SQUARE in problem for problem in report["problems"])
    renamed(adapter)
    dora_convert.merge(base, adapter, tmp_path / "some", allow_unmatched=True)
    assert run("verify", base, adapter, tmp_path / "some", "--allow-unmatched", "-q")[:2] == (0, "agree\n")
