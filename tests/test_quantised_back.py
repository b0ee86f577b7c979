"""Quantised bases and the other verbs: verify, unmerge, extract, from-lora, to-lora and inspect."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert import UnsupportedError
from dora_convert.engine.precision import as_bytes

from .quantised_bases import GOLDEN, LLAMA, TRUTH, copy_base, dense_values, make_adapter, merged_values

QUICK = {"device": "cpu", "workers": 1}


@pytest.fixture(params=["all", "touched", "back"])
def merged(request, tmp_path):
    """A base of each kind of output, its adapter and the merge."""
    kind = {"all": "bnb-nf4-double", "touched": "ct-int4", "back": "fp8-cut-off"}[request.param]
    choice = {"all": {"dequantize": True}, "touched": {"dequantize_touched": True}, "back": {}}[request.param]
    base = copy_base(kind, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base, adapter, tmp_path / "out", **choice, **QUICK)
    return base, adapter, tmp_path / "out"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_verify_agrees(merged):
    """The written weights are compared with the definition, whatever they are stored as."""
    base, adapter, out = merged
    report = dora_convert.verify(base, adapter, out, **QUICK)
    assert report.verdict == "agree", report.problems
    assert {module.name for module in report.modules} == {f"{module}.weight" for module in LLAMA}
    assert all(0 < module.output_error < 0.05 for module in report.modules)
    assert report.untouched.identical == report.untouched.tensors


def test_verify_sees_a_wrong_code(merged):
    """One changed byte of a touched weight is found."""
    base, adapter, out = merged
    tensors = load_file(out / "model.safetensors")
    name = f"{LLAMA[1]}.weight"
    wrong = tensors[name].clone()
    wrong.view(torch.uint8)[3, 9] ^= 64
    save_file({**tensors, name: wrong}, out / "model.safetensors", {"format": "pt"})
    report = dora_convert.verify(base, adapter, out, **QUICK)
    assert report.verdict == "differ"
    assert any(name in problem for problem in report.problems)


def test_unmerge_gives_the_quantised_base_back(merged, tmp_path):
    """Bit for bit: the old parts are in the record."""
    base, adapter, out = merged
    report = dora_convert.unmerge(out, adapter, tmp_path / "back", **QUICK)
    assert contents(tmp_path / "back") == contents(base)
    assert report.exact["bit_exact"] == report.exact["tensors"]


@pytest.mark.parametrize("kind", sorted(TRUTH.keys() - {"gpt-oss"}))
def test_every_kind_comes_back(kind, tmp_path):
    """Coded again where that may be, else dense where touched: verify agrees, and unmerge restores every tensor."""
    base = copy_base(kind, tmp_path / "base")
    adapter, before = make_adapter(tmp_path / "adapter", base, dora=True), load_file(base / "model.safetensors")
    choice = {"dequantize_touched": True} if kind.startswith(("gptq", "awq")) else {"requantize": True}
    dora_convert.merge(base, adapter, tmp_path / "out", **choice, **QUICK)
    written = load_file(tmp_path / "out/model.safetensors")
    parts = written.keys() if "requantize" in choice else written.keys() & before.keys()
    assert {name: written[name].dtype for name in parts} == {name: before[name].dtype for name in parts}
    report = dora_convert.verify(base, adapter, tmp_path / "out", **QUICK)
    assert report.verdict == "agree", report.problems
    dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "back", **QUICK)
    after = load_file(tmp_path / "back/model.safetensors")
    assert after.keys() == before.keys()
    assert all(as_bytes(after[name]) == as_bytes(value) for name, value in before.items())


def test_without_a_record(tmp_path):
    """Without a record the quantised base cannot be restored, and the error says so."""
    base = copy_base("fp8-blocks", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    dora_convert.merge(base, adapter, tmp_path / "out", undo="none", **QUICK)
    with pytest.raises(UnsupportedError, match="cannot restore"):
        dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "back", **QUICK)


def test_other_verbs_read_as_if_dense(tmp_path):
    """from-lora, to-lora and extract take a quantised base for its dense values."""
    base = copy_base("gptq-order", tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base, dora=False)
    dora_convert.from_lora(base, lora, tmp_path / "dora", **QUICK)
    magnitude = load_file(tmp_path / "dora/adapter_model.safetensors")[
        f"base_model.model.{LLAMA[0]}.lora_magnitude_vector"
    ]
    wanted = merged_values(base, lora)[f"{LLAMA[0]}.weight"].norm(dim=1)
    assert torch.allclose(magnitude.double(), wanted, rtol=1e-6)
    dora_convert.to_lora(base, tmp_path / "dora", tmp_path / "again", rank=4, **QUICK)
    one, two = merged_values(base, lora), merged_values(base, tmp_path / "again")
    for module in LLAMA:
        scale = one[f"{module}.weight"].norm()
        assert (two[f"{module}.weight"] - one[f"{module}.weight"]).norm() < 0.6 * scale  # the config's alpha differs
    dora_convert.merge(base, lora, tmp_path / "tuned", dequantize=True, dtype="float32", **QUICK)
    report = dora_convert.extract(base, tmp_path / "tuned", tmp_path / "extracted", rank=4, kind="lora", **QUICK)
    assert {module.name for module in report.modules} >= {f"{module}.weight" for module in LLAMA}
    assert report.relative_error < 1e-3


@pytest.mark.parametrize("option", ["dequantize", "dequantize_touched", "requantize"])
def test_idle_options_warn(tmp_path, base, adapter, option):
    """A dense base has nothing to dequantize, and the report says so."""
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", dry_run=True, **{option: True})
    assert any("is not quantised" in warning for warning in report.warnings)


@pytest.mark.parametrize("kind", ["fp8-blocks", "bnb-nf4"])
def test_extract_of_dense_from_coded(tmp_path, kind):
    """Weights of one dtype, coded in BASE and dense in TUNED, are compared by value: those untouched are the same."""
    lora = make_adapter(tmp_path / "lora", GOLDEN / kind, dora=False)
    dora_convert.merge(GOLDEN / kind, lora, tmp_path / "tuned", dequantize=True, **QUICK)
    report = dora_convert.extract(GOLDEN / kind, tmp_path / "tuned", tmp_path / "extracted", rank=4, **QUICK)
    assert {module.name for module in report.modules} == {f"{module}.weight" for module in LLAMA}


@pytest.mark.parametrize(
    ("kind", "words"),
    [("gptq", "GPTQ 4 bits, groups of 16"), ("fp8-blocks", "blocks of 16 × 16"), ("mlx-8", "MLX 8 bits")],
)
def test_inspect_counts_dense_parameters(kind, words):
    """inspect names the kind of quantisation, and counts the parameters that the model has."""
    report = dora_convert.inspect(GOLDEN / kind)
    values = dense_values(GOLDEN / kind)
    assert report.parameters == sum(value.numel() for value in values.values())
    assert any(words in title for title in report.coded)
    assert sum(count["tensors"] for count in report.coded.values()) == len(TRUTH[kind])


def test_inspect_says_which_option_is_missing(tmp_path):
    """An adapter fits a base whose weights a merge must not code again; the report names the options."""
    base = copy_base("bnb-nf4", tmp_path / "base")
    landing = dora_convert.inspect(make_adapter(tmp_path / "adapter", base, dora=True), base=base).landing
    assert (landing.fits, landing.tensors["merged"]) == (True, len(LLAMA))
    assert any("--dequantize-touched" in warning for warning in landing.warnings)


def test_base_as(tmp_path, monkeypatch):
    """--base-as needs bitsandbytes, and a 16-bit base; tests/oracles/quantised.py compares its results."""
    from dora_convert import UsageError

    base = copy_base("fp8-blocks", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    monkeypatch.setattr("dora_convert.settings._is_installed", lambda _: False)
    with pytest.raises(UsageError, match="bitsandbytes") as error:
        dora_convert.merge(base, adapter, tmp_path / "out", base_as="nf4", **QUICK)
    assert "dora-convert[nf4]" in error.value.hint
    monkeypatch.setattr("dora_convert.settings._is_installed", lambda _: True)
    with pytest.raises(UsageError, match="is quantised already"):
        dora_convert.merge(base, adapter, tmp_path / "out", base_as="nf4", **QUICK)


def test_notice_of_a_quantised_training(tmp_path):
    """An adapter whose config names a quantised base gets a notice: which base, and what else could be chosen."""
    import json

    base = copy_base("fp8-blocks", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    dora_convert.merge(base, adapter, tmp_path / "dense", dequantize=True, **QUICK)
    config = json.loads((adapter / "adapter_config.json").read_text())
    named = {**config, "base_model_name_or_path": "unsloth/model-bnb-4bit"}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    notices = []
    dora_convert.merge(tmp_path / "dense", adapter, tmp_path / "out", on_notice=notices.append, **QUICK)
    assert any("base_as" in notice and "quantised" in notice for notice in notices), notices
