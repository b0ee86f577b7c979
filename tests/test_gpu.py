"""On a CUDA device: the same function, within the bound, from the same blocks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert

from .toy import contents, exact, load, make_adapter, make_base, rounded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dora", [True, False])
def test_gpu_results_are_exact(tmp_path, dtype, dora):
    """float64 on the device, rounded once: what the CPU gives, but for ties."""
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", device="cuda")
    assert report.device.startswith("cuda")
    assert (report.verified.wrong_elements, report.verified.max_ulp) == (0, 0)
    got = load(tmp_path / "out")
    for name, x in exact(base, adapter).items():
        assert torch.equal(got[name], rounded(x, dtype)), name


def test_gpu_bytes_do_not_depend_on_workers(tmp_path):
    """Streams and order do not show."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    for workers in (1, 4):
        dora_convert.merge(base.path, adapter, tmp_path / f"out{workers}", device="cuda", workers=workers)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out4")


def test_gpu_embeddings_and_replacements(tmp_path):
    """Two passes, saved modules, and several adapters."""
    base = make_base(tmp_path / "base")
    extra = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(4, 72),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(40, 4),
        "base_model.model.model.embed_tokens.lora_magnitude_vector": torch.rand(40) + 8,
        "base_model.model.lm_head.weight": torch.randn(72, 40),
    }
    first = make_adapter(tmp_path / "one", base, dora=True, extra=extra)
    second = make_adapter(tmp_path / "two", base, dora=False, seed=8)
    for device in ("cpu", "cuda"):
        report = dora_convert.merge(base.path, [first, second], tmp_path / device, device=device)
        assert report.verified.wrong_elements == 0
    for name, tensor in load(tmp_path / "cpu").items():
        assert torch.equal(load(tmp_path / "cuda")[name], tensor), name


def test_gpu_verify(tmp_path):
    """Every element compared on the device: what is right agrees, and one element that is off is found."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    report = dora_convert.verify(base.path, adapter, tmp_path / "out", device="cuda")
    assert report.verdict == "agree"
    path = tmp_path / "out/model-00001-of-00002.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name].view(torch.int16)[3, 5] += 2
    save_file(tensors, path, {"format": "pt"})
    report = dora_convert.verify(base.path, adapter, tmp_path / "out", device="cuda")
    assert report.verdict == "differ"
    assert [module.name for module in report.modules if module.wrong_elements] == [name]


def test_gpu_outputs(tmp_path):
    """Models run on the device, whole or block by block, and say what they say on the CPU."""
    from .test_outputs import merged, outputs

    base, adapter, out = merged(tmp_path)
    whole = outputs(base, adapter, out, device="cuda")
    part = outputs(base, adapter, out, device="cuda", max_memory=whole.memory_bytes - 1)
    here = outputs(base, adapter, out, device="cpu")
    assert (whole.device[:4], whole.offloaded, part.offloaded) == ("cuda", False, True)
    for report in (whole, part):
        assert report.verdict == "agree"
        assert report.mean_abs_logit_error == pytest.approx(here.mean_abs_logit_error, rel=0.1)
