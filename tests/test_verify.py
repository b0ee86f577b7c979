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
from .test_kinds import EMBEDDING, head, tied, tokens  # noqa: F401 - `tied` is a fixture
from .toy import ALPHA, SHAPES, Base, contents, edit_json, load, make_adapter

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RANK, S = 3, 2.0  # alpha/r = 2, alpha/√r = 3.46, alpha = 6: no cause looks like another
SQUARE, WIDE = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
NORM, HEAD, TENSORS = "model.norm.weight", "lm_head.weight", "adapter_model.safetensors"
SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
PLAIN = {"targets": ("k_proj",), "dora": False}


def agrees(base, adapters, out, **options):
    report = dora_convert.verify(base, adapters, out, **options)
    assert (report.verdict, report.problems) == ("agree", ())
    assert all(module.wrong_elements == 0 < module.elements for module in report.modules)
    assert report.untouched.tensors == report.untouched.identical
    return report


def differs(base, adapters, out, name="", word=""):
    report = dora_convert.verify(base, adapters, out)
    assert report.verdict == "differ"
    assert any(name in text and re.search(f"(?i){word}", text) for text in report.problems), report.problems
    return report


def tamper(out, changes):
    """Write other tensors into the shards where they lie; None drops one, an unknown name is added."""
    index, before = json.loads((out / INDEX).read_text()), load(out)
    for name, value in changes.items():
        old, file = before.get(name), index["weight_map"].pop(name, SHARD)
        assert any(x is None for x in (old, value)) or not torch.equal(old, value), f"{name} does not change"
        shard = {other: tensor for other, tensor in load_file(out / file).items() if other != name}
        if value is not None:
            shard[name], index["weight_map"][name] = value.contiguous(), file
        save_file(shard, out / file, {"format": "pt"})
    toy.write_json(out / INDEX, index)


def moved(tensor, ulps, at):
    tensor = tensor.clone()
    tensor.view(torch.int16).view(-1)[at] += ulps
    return tensor


def merged(tmp_path, *, dora=True, dtype=BF16):
    base = toy.make_base(tmp_path / "base", dtype)
    edit_json(base.path / "config.json", vocab_size=72, num_hidden_layers=2, transformers_version="4.1")
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora, targets=tuple(SHAPES), rank=RANK)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    return base.path, adapter, tmp_path / "out"


def parts(base, adapter):
    tensors = load_file(adapter / TENSORS)
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
    paths = base, adapter, out = [tmp_path / name for name in ("base", "adapter", "out")]
    dora_convert.merge(*paths)
    agrees(*paths)
    for safe in (True, False):
        peft_model = PeftModel.from_pretrained(copy.deepcopy(model), adapter)
        state = peft_model.merge_and_unload(safe_merge=safe).state_dict()
        state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
        save_file(state, out / "model.safetensors", {"format": "pt"})
        agrees(base, adapter, out)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("dora", "tie"), [(True, False), (False, True)])
def test_pefts_llama_agrees(tmp_path, dtype, dora, tie):
    torch.manual_seed(0)
    sizes = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tie)
    LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    base = Base(tmp_path / "base", load(tmp_path / "base"))
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora, targets=targets)
    for safe in (True, False):
        model = LlamaForCausalLM.from_pretrained(base.path, dtype=dtype)
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=safe)
        model.save_pretrained(tmp_path / f"peft{safe}")
        assert len(agrees(base.path, adapter, tmp_path / f"peft{safe}").modules) == 14


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("dora", "late"), [(False, False), (True, False), (True, True)])
def test_two_roundings_agree(tmp_path, dora, late, dtype):
    """The delta, then the result; axolotl's DoRA (late) rounds the result, what it adds to W, and their sum."""
    base, adapter, out = merged(tmp_path, dora=dora, dtype=dtype)
    changes = {}
    for name, W, D, m in parts(base, adapter):
        delta = grown(W + S * D, m).to(dtype) - W.to(dtype) if late else (S * D).to(dtype)
        changes[name] = (W + delta if late else grown(W + delta, m)).float().to(dtype)
    tamper(out, changes)
    assert any(module.max_ulp > 0 for module in agrees(base, adapter, out).modules)


def test_saved_modules_rows_ties_and_weights(tmp_path, base, tied):
    """Replaced and added tensors and rows, and two adapters, agree when they are right, and not two ulps away."""
    saved = PLAIN | {"modules_to_save": ["lm_head"], "extra": {f"base_model.model.{HEAD}": torch.ones(72, 40)}}
    cases = [
        (base, make_adapter(tmp_path / "s", base, **saved), HEAD, 3),
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
    paths = [make_adapter(tmp_path / f"a{k}", base, dora=k > 0, seed=k + 5) for k in range(2)]
    dora_convert.merge(base.path, paths, tmp_path / "out", weight=[0.5, -0.25])
    agrees(base.path, paths, tmp_path / "out", weight=[0.5, -0.25])
    shutil.rmtree(tmp_path / "out" / "dora_convert")  # whose receipt has the weights
    differs(base.path, paths, tmp_path / "out", WIDE)


CAUSES = {  # grown(V, None) is V: the same mistakes with LoRA
    "magnitude": (WIDE, "magnitude", lambda W, D, _: W + S * D),
    "axis": (SQUARE, "axis", lambda W, D, m: grown((W + S * D).T, m).T),
    "alpha": (WIDE, "scaling", lambda W, D, m: grown(W + ALPHA * D, m)),
    "root": (WIDE, "scaling", lambda W, D, m: grown(W + ALPHA / RANK**0.5 * D, m)),
    "factor": (WIDE, "scaling", lambda W, D, m: grown(W + 0.7 * D, m)),
    "missing": (WIDE, "not merged", lambda W, *_: W),
    "twice": (WIDE, "twice", lambda W, D, m: grown(grown(W + S * D, m) + S * D, m)),
    "transposed": (SQUARE, "transposed", lambda W, D, m: grown(W + S * D.T, m)),
}


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(("cause", "dora"), [*((c, 1) for c in CAUSES), *((c, 0) for c in list(CAUSES)[2:])])
def test_wrong_modules_are_named_with_the_cause(tmp_path, cause, dora, everywhere):
    """In one module, and in every one that can have it; the others are not accused."""
    base, adapter, out = merged(tmp_path, dora=bool(dora))
    target, word, wrong = CAUSES[cause]
    kind = "proj" if target == WIDE else "q_proj"
    chosen = [part for part in parts(base, adapter) if part[0] == target or (everywhere and kind in part[0])]
    changes = {name: toy.rounded(wrong(*part), BF16) for name, *part in chosen}
    tamper(out, changes)
    report = differs(base, adapter, out, "" if everywhere else target, word)
    assert {module.name for module in report.modules if module.wrong_elements} == changes.keys()
    assert all(any(name in text for text in report.problems) for name in changes)
    for module in report.modules:
        assert (module.output_error > 2 * module.output_floor) == (module.name in changes)
        assert module.name in changes or module.name not in " ".join(report.problems)


def test_another_base(tmp_path):
    base, adapter, out = merged(tmp_path)
    other = Base(base, {name: torch.randn(tensor.shape).bfloat16() for name, tensor in load(base).items()})
    tamper(out, {name: toy.rounded(x, BF16) for name, x in toy.exact(other, adapter, scale=S).items()})
    assert differs(base, adapter, out, word="another base").untouched.identical == 0


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("dora", [True, False])
def test_one_tensor(tmp_path, dtype, dora):
    """One element two ulps away; a byte of an untouched tensor; a tensor too few, too many, of another shape, NaN."""
    base, adapter, out = merged(tmp_path, dora=dora, dtype=dtype)
    good, nan = load(out), torch.full((1, 40), torch.nan, dtype=dtype)
    moves = [(WIDE, 0, 2), (WIDE, -1, -2), (SQUARE, 777, 2), (SQUARE, 40, 64), (NORM, 9, 1)]
    cases = [(name, moved(good[name], ulps, at), abs(ulps)) for name, at, ulps in moves]
    cases += [(NORM, None, 0), (WIDE, None, 0), ("model.extra.weight", torch.ones(3), 0)]
    cases += [(WIDE, good[WIDE].T, 0), (WIDE, torch.cat([nan, good[WIDE][1:]]), 0)]
    for name, value, ulps in cases:
        tamper(out, {name: value})
        report = differs(base, adapter, out, name)
        wrong = [(m.name, m.wrong_elements, m.max_ulp) for m in report.modules if m.wrong_elements]
        assert not ulps or wrong == ([] if name == NORM else [(name, 1, ulps)])
        assert not ulps or report.untouched.identical == (4 if name == NORM else 5)
        tamper(out, {name: good.get(name)})
    agrees(base, adapter, out)


def test_config_and_side_files(tmp_path):
    """A key that changes loading or computing counts; versions, README and tokenizer do not."""
    base, adapter, out = merged(tmp_path)
    config = (out / "config.json").read_text()
    counts = {"vocab_size": 71, "num_hidden_layers": 3, "tie_word_embeddings": True, "hidden_size": 41}
    counts |= {"architectures": ["LlamaModel"], "torch_dtype": "float16", "model_type": "mistral"}
    for key, value in counts.items():
        assert json.loads(config)[key] != value
        edit_json(out / "config.json", **{key: value})
        differs(base, adapter, out, key.removeprefix("torch_"))
        (out / "config.json").write_text(config)
    edit_json(out / "config.json", transformers_version="5.0", _name_or_path="x", dtype="bfloat16")
    for name in ("README.md", "tokenizer_config.json", "tokenizer.json"):
        (out / name).write_text("{}")
    shutil.rmtree(out / "dora_convert")
    agrees(base, adapter, out)


def test_ties_that_are_wrong(tmp_path, tied):
    """A head left tied that the adapter changed, an embedding changed with it, and a flag against the tensors."""
    adapter, good = make_adapter(tmp_path / "a", tied, extra=head(), **PLAIN), tmp_path / "good"
    dora_convert.merge(tied.path, adapter, good)
    wrong = load(good)[HEAD]
    changes = [({}, True), ({HEAD: None}, True), ({HEAD: None, EMBEDDING: wrong}, True)]
    for number, (change, tie) in enumerate([*changes, ({EMBEDDING: wrong}, False)]):
        out = shutil.copytree(good, tmp_path / f"out{number}")
        edit_json(out / "config.json", tie_word_embeddings=tie)
        tamper(out, change)
        assert contents(out) != contents(good)
        differs(tied.path, adapter, out, *(("", r"\b(un)?tie") if tie else (EMBEDDING,)))


UNDECIDABLE = {
    "missing shard": lambda out, _: (out / SHARD).unlink(),
    "truncated shard": lambda out, _: (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-1]),
    "other format": lambda out, _: [file.rename(f"{file}.gguf") for file in out.glob("model*")],
    "no such folder": lambda out, _: shutil.rmtree(out),
    "the adapter's folder": lambda out, adapter: [shutil.rmtree(out), shutil.copytree(adapter, out)],
    "lost adapter": lambda _, adapter: save_file({"x.lora_A.weight": torch.ones(3, 4)}, adapter / TENSORS),
}


@pytest.mark.parametrize("case", UNDECIDABLE)
def test_undecidable(run, tmp_path, case):
    """An input that cannot be read or judged is an error with exit code 2, and never a difference."""
    base, adapter, out = merged(tmp_path)
    before = contents(tmp_path)
    UNDECIDABLE[case](out, adapter)
    assert contents(tmp_path) != before
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.verify(base, adapter, out)
    assert SHARD in caught.value.text() or "shard" not in case
    assert run("verify", base, adapter, out)[:2] == (2, "")
    assert json.loads(run("verify", base, adapter, out, "--json", "-q")[2])["error"]["message"]


def test_command_line(run, tmp_path):
    base, adapter, out = merged(tmp_path)
    words, before = ("verify", base, adapter, out), contents(tmp_path)
    assert (run(*words)[0], *run(*words, "--quiet")) == (0, 0, "agree\n", "")
    assert contents(tmp_path) == before
    tamper(out, {SQUARE: moved(load(out)[SQUARE], 2, 5)})
    assert re.search(r"(?s)differ.*layers\.1\.self_attn\.q_proj|q_proj.*differ", run(*words)[1])
    assert run(*words, "-q") == (1, "differ\n", "")
    report = json.loads(run(*words, "--json", "--samples", 3)[1])
    assert (report["schema"], report["command"], report["verdict"]) == (1, "verify", "differ")
    assert report.keys() >= {"version", "seconds", "problems"}
    assert {"name", "wrong_elements", "elements", "max_ulp", "output_error"} <= report["modules"][0].keys()
    assert report["untouched"] == {"tensors": 5, "identical": 5}
