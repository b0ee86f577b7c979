"""Merged weights of 8-bit kinds are coded again: by whose rule, what is lost, and what stays as bytes."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import dora_convert

from .quantised_bases import LLAMA, copy_base, dense_values, make_adapter, merged_values

KINDS = (
    "fp8-blocks", "fp8-cut-off", "fp8-tensor", "fp8-rows", "fp8-ue8m0", "fp8-exponents", "fp8-mistral", "ct-fp8-rows",
    "ct-fp8-tensor", "ct-fp8-block", "ct-mxfp8", "ct-int8-rows", "ct-int8-tensor", "ct-int8-asymmetric", "bnb-int8",
    "torchao-int8", "torchao-fp8", "mlx-8",
)  # fmt: skip
FEW = (
    "bnb-nf4", "bnb-nf4-double", "bnb-fp4", "bnb-nf4-bf16","ct-int4", "ct-int4-asymmetric", "ct-int4-order", "ct-int3", "ct-int4-rows", "ct-int8-packed", "ct-nvfp4", "ct-mxfp4", "modelopt-nvfp4", "mlx-4", "mlx-3", "mlx-6", "mlx-mxfp4", "mlx-mxfp8", "mlx-nvfp4", "torchao-int4", "torchao-int4-asymmetric")  # fmt: skip
QUICK = {"device": "cpu", "workers": 1}


def raw(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("kind", KINDS)
def test_write_back(kind, tmp_path):
    """Only parts of touched weights change; values are as near as the codes allow; the loss is told."""
    base = copy_base(kind, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    report = dora_convert.merge(base, adapter, tmp_path / "out", **QUICK)
    before, after = raw(base), raw(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all((before[n].dtype, before[n].shape) == (after[n].dtype, after[n].shape) for n in before)
    changed = {
        n for n in before if not torch.equal(before[n].view(-1).view(torch.uint8), after[n].view(-1).view(torch.uint8))
    }
    assert changed
    assert all(name.startswith(LLAMA) for name in changed), changed
    got, wanted, old = dense_values(tmp_path / "out"), merged_values(base, adapter), dense_values(base)
    for module in LLAMA:
        W, x, b = (values[f"{module}.weight"] for values in (got, wanted, old))
        assert (W - x).norm() < 0.1 * (x - b).norm(), module
        assert (W - x).abs().max() <= 0.04 * x.abs().max()
    assert report.verified.wrong_elements == 0
    assert 0 < report.lost < 0.1
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("kind", FEW)
def test_requantize(kind, tmp_path):
    """--requantize makes codes of fewer bits anew, and says what is lost."""
    base = copy_base(kind, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    report = dora_convert.merge(base, adapter, tmp_path / "out", requantize=True, **QUICK)
    assert report.verified.wrong_elements == 0
    got, wanted, old = dense_values(tmp_path / "out"), merged_values(base, adapter), dense_values(base)
    for module in LLAMA:
        W, x, b = (values[f"{module}.weight"] for values in (got, wanted, old))
        assert (W - x).norm() < (0.7 if "int3" in kind or kind == "mlx-3" else 0.35) * (x - b).norm(), module
    assert any("of the change is lost" in text for text in report.warnings) == (report.lost > 0.1)


def test_scales_stay_unless_they_overflow(tmp_path):
    """A block whose values fit keeps its scale bit by bit; one whose values do not gets absmax / 448."""
    base = copy_base("fp8-blocks", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    dora_convert.merge(base, adapter, tmp_path / "out", **QUICK)
    before, after, x = raw(base), raw(tmp_path / "out"), merged_values(base, adapter)
    kept = made = 0
    for module in LLAMA:
        old, new = (tensors[f"{module}.weight_scale_inv"] for tensors in (before, after))
        blocks = x[f"{module}.weight"].unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).abs().amax((1, 3))
        fits = blocks <= 448 * old.double()
        kept, made = kept + int(fits.sum()), made + int((~fits).sum())
        assert torch.equal(new[fits], old[fits])
        assert torch.equal(new[~fits], (blocks / 448).float()[~fits])
        wide = new.double().repeat_interleave(16, 0).repeat_interleave(16, 1)
        codes = (x[f"{module}.weight"] / wide).clamp(-448, 448).float().to(torch.float8_e4m3fn)
        assert torch.equal(codes.view(torch.uint8), after[f"{module}.weight"].view(torch.uint8))
    assert kept
    assert made


def test_bytes_do_not_depend_on_chunks(tmp_path, monkeypatch):
    """Small chunks inside blocks give the same codes and scales."""
    for kind in ("fp8-blocks", "fp8-cut-off", "ct-int8-tensor", "mlx-8"):
        base = copy_base(kind, tmp_path / kind)
        adapter = make_adapter(tmp_path / f"{kind}-adapter", base, dora=False)
        dora_convert.merge(base, adapter, tmp_path / f"{kind}-1", undo="none", **QUICK)
        with monkeypatch.context() as patch:
            patch.setattr("dora_convert.engine.recoding.CHUNK_ELEMENTS", 100)
            dora_convert.merge(base, adapter, tmp_path / f"{kind}-2", undo="none", **QUICK)
        assert (tmp_path / f"{kind}-1/model.safetensors").read_bytes() == (
            tmp_path / f"{kind}-2/model.safetensors"
        ).read_bytes()


def test_replaced_weights_become_dense(tmp_path):
    """A weight that the adapter brings whole is written as it is, and listed as dense."""
    import json

    from safetensors.torch import save_file

    base = copy_base("fp8-blocks", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj"
    whole = torch.randn(64, 32).bfloat16()
    save_file({**tensors, f"{name}.weight": whole}, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["up_proj"]}))
    dora_convert.merge(base, adapter, tmp_path / "out", **QUICK)
    after = raw(tmp_path / "out")
    assert torch.equal(after["model.layers.0.mlp.up_proj.weight"], whole)
    assert after["model.layers.0.mlp.gate_proj.weight"].dtype == torch.bfloat16
    skipped = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"} == set(skipped)


def test_a_stopped_merge_goes_on(tmp_path, monkeypatch):
    """All parts of a weight are finished, or none: a resumed run leaves the bytes of one that was not stopped."""
    from dora_convert.engine import recoding

    base = copy_base("fp8-blocks", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base, adapter, tmp_path / "whole", **QUICK)
    write, calls = recoding.write_coded, []

    def stops(*words):
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*words)

    with monkeypatch.context() as patch:
        patch.setattr(recoding, "write_coded", stops)
        with pytest.raises(KeyboardInterrupt):
            dora_convert.merge(base, adapter, tmp_path / "out", **QUICK)
    assert dora_convert.merge(base, adapter, tmp_path / "out", **QUICK).resumed
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(
        path.read_bytes() == (tmp_path / "whole" / path.relative_to(tmp_path / "out")).read_bytes() for path in files
    )


@pytest.mark.parametrize(
    ("kind", "size"), [("ct-nvfp4", 1), ("modelopt-nvfp4", 1), ("mlx-nvfp4", 1e6), ("mlx-4", 1e18), ("bnb-int8", 1e18), ("bnb-nf4", 1e18), ("bnb-nf4-double", 1e18)]
)  # fmt: skip
def test_scales_that_overflow_are_named(kind, size, tmp_path):
    """Not a failed self-check, nor a clipped block: the scale's dtype has an end."""
    base = copy_base(kind, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False, size=size)
    with pytest.raises(dora_convert.NumericalError, match=r"too large for .* a block's scale overflows") as caught:
        dora_convert.merge(base, adapter, tmp_path / "out", requantize=True, **QUICK)
    assert "touched" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_scale_at_its_end_still_holds_what_rounds_to_the_largest_code(tmp_path):
    """Values up to 7 × the largest scale round to the code of 6: verify agrees, element by element."""
    base = copy_base("ct-nvfp4", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False, size=0.0325)
    dora_convert.merge(base, adapter, tmp_path / "out", requantize=True, **QUICK)
    written = raw(tmp_path / "out")
    assert max(float(written[name].float().max()) for name in written if name.endswith("weight_scale")) == 448
    assert dora_convert.verify(base, adapter, tmp_path / "out", **QUICK).verdict == "agree"
