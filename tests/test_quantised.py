"""Merges onto quantised bases: written dense, all or the touched weights, or refused with the ways out."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert import UnsupportedError, UsageError

from .quantised_bases import GOLDEN, LLAMA, TRUTH, copy_base, dense_values, make_adapter, merged_values, opened, rounded

MODELS = sorted(kind for kind in TRUTH if kind != "gpt-oss")
PLACES = ("quantization_config", "quantization", "compression_config")
QUICK = {"device": "cpu", "workers": 1}


LORAS = ("fp8-blocks", "gptq-order", "bnb-nf4-double")
"""Kinds that get a LoRA, too; all get a DoRA, which needs the norms of the decoded rows."""


@pytest.mark.parametrize(("kind", "dora"), [(kind, True) for kind in MODELS] + [(kind, False) for kind in LORAS])
def test_dequantize_is_exact(kind, dora, tmp_path):
    """All weights are the float64 result rounded once, and nothing says any more that the model is quantised."""
    base = copy_base(kind, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora)
    report = dora_convert.merge(base, adapter, tmp_path / "out", dequantize=True, **QUICK)
    got, wanted = load_file(tmp_path / "out/model.safetensors"), merged_values(base, adapter)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], rounded(value, got[name].dtype)), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not set(config) & set(PLACES)
    assert report.verified.wrong_elements == 0
    assert report.verified.checked > 0
    assert set(opened(tmp_path / "out").shards[0].metadata) == {"format"}


@pytest.mark.parametrize("kind", ["bnb-nf4", "gptq-order", "awq", "mlx-4", "ct-int4", "modelopt-nvfp4", "torchao-int4"])
def test_dequantize_touched(kind, tmp_path):
    """Touched modules and their siblings are dense and listed as such; all other parts are the base's bytes."""
    base = copy_base(kind, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base, adapter, tmp_path / "out", dequantize_touched=True, **QUICK)
    wanted, before, after = (
        merged_values(base, adapter), load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    )  # fmt: skip
    attention = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    dense = [*attention, "model.layers.0.mlp.down_proj.weight"]
    for name in dense:
        assert torch.equal(after[name], rounded(wanted[name], after[name].dtype)), name
    kept = {name for name in before if not any(name.startswith(one.removesuffix("weight")) for one in dense)}
    assert after.keys() == kept | set(dense)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert {name for name, tensor in dense_values(tmp_path / "out").items()} == set(wanted)
    config = json.loads((tmp_path / "out/config.json").read_text())
    text = json.dumps({key: config.get(key) for key in PLACES})
    assert all(name.removesuffix(".weight").replace(".", "\\\\.") in text for name in dense) or all(
        name.removesuffix(".weight") in text for name in dense
    )


def test_metadata_of_torchao(tmp_path):
    """torchao's description of a tensor follows the tensor."""
    base = copy_base("torchao-int4", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    dora_convert.merge(base, adapter, tmp_path / "out", dequantize_touched=True, **QUICK)
    metadata = opened(tmp_path / "out").shards[0].metadata
    assert json.loads(metadata[f"{LLAMA[0]}.weight"]) == {"_type": "Tensor"}
    assert "IntxUnpacked" in metadata["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("kind", ["bnb-nf4", "gptq", "awq", "mlx-mxfp4", "ct-nvfp4"])
def test_few_bits_are_refused(kind, tmp_path):
    """The error names the ways out; codes that calibration chose are not even made again on demand."""
    base = copy_base(kind, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    with pytest.raises(UnsupportedError, match="changes 2 quantised weights") as error:
        dora_convert.merge(base, adapter, tmp_path / "out", **QUICK)
    assert "dequantize=True writes all" in error.value.hint
    assert "dequantize_touched=True" in error.value.hint
    assert ("requantize=True" in error.value.hint) == (kind not in ("gptq", "awq"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="contradict"):
        dora_convert.merge(base, adapter, tmp_path / "out", dequantize=True, requantize=True, **QUICK)


def test_dense_tensors_of_a_quantised_base(tmp_path):
    """An adapter that touches only dense tensors merges without a word, and nothing else changes."""
    base = copy_base("gpt-oss", tmp_path / "base")
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    adapter = make_adapter(tmp_path / "adapter", base, dora=True, modules=modules)
    report = dora_convert.merge(base, adapter, tmp_path / "out", **QUICK)
    assert report.warnings == ()
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert [name for name in before if not torch.equal(before[name], after[name])] == [f"{m}.weight" for m in modules]
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_experts_of_gpt_oss(tmp_path):
    """Experts are decoded in strips of columns, a few rows of one expert at a time."""
    base = copy_base("gpt-oss", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False, modules=["model.layers.0.self_attn.q_proj"])
    dora_convert.merge(base, adapter, tmp_path / "out", dequantize=True, **QUICK)
    got, wanted = load_file(tmp_path / "out/model.safetensors"), dense_values(GOLDEN / "gpt-oss")
    for name in TRUTH["gpt-oss"]:
        assert torch.equal(got[name], rounded(wanted[name], torch.bfloat16))
    plan = dora_convert.merge(base, adapter, tmp_path / "plan", dequantize=True, dry_run=True, **QUICK).plan
    assert plan["memory"] < 11 << 20


@pytest.mark.parametrize("key", PLACES)
def test_stale_fields(key, tmp_path):
    """A config that says quantised over dense weights is a warning; --dequantize removes the field."""
    base = copy_base("fp8-blocks", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    dora_convert.merge(base, adapter, tmp_path / "dense", dequantize=True, **QUICK)
    config = json.loads((tmp_path / "dense/config.json").read_text())
    (tmp_path / "dense/config.json").write_text(json.dumps({**config, key: {"quant_method": "fp8"}}))
    report = dora_convert.merge(tmp_path / "dense", adapter, tmp_path / "stale", **QUICK)
    assert any("its weights are dense" in warning for warning in report.warnings)
    assert key in json.loads((tmp_path / "stale/config.json").read_text())
    dora_convert.merge(tmp_path / "dense", adapter, tmp_path / "clean", dequantize=True, **QUICK)
    assert key not in json.loads((tmp_path / "clean/config.json").read_text())


@pytest.mark.parametrize("method", ["hqq", "aqlm", "quanto", "vptq", "bitnet"])
def test_others_are_refused_by_name(method, tmp_path):
    """A kind that is not read is refused in one sentence."""
    base = copy_base("gptq", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(UnsupportedError, match=f"(?i)is quantised by {method}, which is not read"):
        dora_convert.merge(base, adapter, tmp_path / "out", **QUICK)


def test_small_memory_and_blocks(tmp_path, monkeypatch):
    """Blocks of any height give the same bytes, for kinds that lie transposed, too."""
    from dora_convert.engine import decoding

    for kind in ("gptq-order", "awq", "gpt-oss", "bnb-nf4", "ct-int3"):
        base = copy_base(kind, tmp_path / kind)
        modules = LLAMA if kind != "gpt-oss" else ["model.layers.0.self_attn.q_proj"]
        adapter = make_adapter(tmp_path / f"{kind}-adapter", base, dora=False, modules=modules)
        dora_convert.merge(base, adapter, tmp_path / f"{kind}-1", dequantize=True, undo="none", **QUICK)
        with monkeypatch.context() as patch:
            patch.setattr("dora_convert.storage.reader.BLOCK_ELEMENTS", 100)
            patch.setattr("dora_convert.storage.reader.ROWS_MULTIPLE", 3)
            patch.setattr(decoding, "CHUNK_ELEMENTS", 64)
            patch.setattr(decoding, "STRIP_BYTES", 100)
            dora_convert.merge(base, adapter, tmp_path / f"{kind}-2", dequantize=True, undo="none", **QUICK)
        one, two = (load_file(tmp_path / f"{kind}-{n}/model.safetensors") for n in (1, 2))
        modules = [f"{module}.weight" for module in modules]
        assert all(torch.equal(one[name], two[name]) for name in one if name not in modules), kind
        assert all(torch.allclose(one[name].float(), two[name].float(), rtol=1e-2) for name in modules)


@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-int8"])
def test_conv1d_is_refused(kind, tmp_path):
    """bitsandbytes stores GPT-2's Conv1D as (out, in), which the model does not: never merged the wrong way round."""
    base = copy_base(kind, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    own = "model.layers.0.self_attn.q_proj"
    named = {name.replace(own, "h.0.attn.c_proj"): value for name, value in tensors.items() if own in name}
    save_file(named | {"wte.weight": torch.zeros(16, 32)}, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
    }
    (base / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(tmp_path / "adapter", base, dora=False, modules=["h.0.attn.c_proj"])
    for choice in ({}, {"dequantize": True}, {"requantize": True}):
        with pytest.raises(UnsupportedError, match="Conv1D"):
            dora_convert.merge(base, adapter, tmp_path / "out", **choice, **QUICK)


def test_in_place_names_out(tmp_path):
    """A quantised base that changes needs an OUT; the options that make it dense say so, too."""
    base = copy_base("fp8-blocks", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    with pytest.raises(UnsupportedError) as refused:
        dora_convert.merge(base, adapter, in_place=True, allow_lossy=True, **QUICK)
    assert "OUT" in str(refused.value.hint)
    with pytest.raises(UsageError, match="does not go with"):
        dora_convert.merge(base, adapter, in_place=True, dequantize=True, **QUICK)
