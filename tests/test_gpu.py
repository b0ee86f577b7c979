"""On a CUDA device: every verb gives the same function, within the bound, from the same blocks.

DORA_CONVERT_REHEARSE=1 runs the same tests on a processor that does as a device does.
"""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert import NumericalError
from dora_convert.engine import run as engine_run
from dora_convert.engine.precision import ComputeSpec, choose
from dora_convert.maths import lora as maths
from dora_convert.plan.large_blocks import LargeItem

from . import quantised_bases as quantised
from .test_other_kinds import CASES, GOLDEN, base_of
from .toy import contents, embeddings_and_head, exact, load, make_adapter, make_base, rounded

REHEARSED = os.environ.get("DORA_CONVERT_REHEARSE") == "1"
reason = f"no CUDA device for torch {torch.__version__}"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSED), reason=reason)]
CARD = torch.device("cpu" if REHEARSED else "cuda")
KINDS = sorted(case for case in CASES if case.startswith("peft-"))
ALLOWED = 1e-4
"""The share of elements that a device may round to a neighbour, and at least one: tensors are small here."""


@pytest.fixture
def device(monkeypatch) -> str:
    """The option, with blocks so small that tensors have several; to rehearse, auto does as a device does."""
    monkeypatch.setattr(LargeItem, "block_elements", 16 * 72)
    if not REHEARSED:
        return "cuda"
    spec = ComputeSpec(CARD, torch.float64, "rehearsed", stages=True)
    monkeypatch.setattr(engine_run, "choose", lambda name, dtype: spec if name == "auto" else choose(name, dtype))
    return "auto"


@pytest.fixture
def base(tmp_path):
    """A base of two shards."""
    return make_base(tmp_path / "base")


@pytest.fixture
def dora(tmp_path, base):
    """A DoRA for the base."""
    return make_adapter(tmp_path / "dora", base, dora=True)


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Compare two merges: a few elements in a million may be neighbours."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        apart = (maths.ordinals(got[name]).long() - maths.ordinals(tensor).long()).abs()
        assert int(apart.max()) <= 1, name
        assert int(apart.sum()) <= max(1, ALLOWED * apart.numel()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dora", [True, False])
def test_merge(tmp_path, device, dtype, dora):
    """float64 on the device, rounded once."""
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", device=device)
    assert report.device.startswith(CARD.type)
    assert (report.verified.wrong_elements, report.verified.max_ulp) == (0, 0)
    same(load(tmp_path / "out"), {name: rounded(x, dtype) for name, x in exact(base, adapter).items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_rounding(dtype):
    """The same bits as on a processor, at every tie, and for subnormal numbers."""
    x = torch.randn(256, 512, dtype=torch.float64) * torch.logspace(-45, 5, 512, dtype=torch.float64)
    near = x.bfloat16().double()
    ties = near * (1 + 2.0**-8)
    for values in (x, near, ties, ties * (1 + 2.0**-50), ties * (1 - 2.0**-50)):
        want = maths.round_to(values, torch.empty(values.shape, dtype=dtype))
        got = maths.round_to(values.to(CARD), torch.empty(values.shape, dtype=dtype, device=CARD)).cpu()
        integers = torch.uint8 if dtype.itemsize == 1 else torch.int16
        finite = want.double().isfinite()
        assert torch.equal(got.view(integers)[finite], want.view(integers)[finite])


@pytest.mark.parametrize("undo", ["norms", "exact"])
def test_bytes_do_not_depend_on_workers(tmp_path, device, base, dora, undo):
    """Streams, order, memory and further lanes do not show."""
    for number, options in enumerate(({"workers": 1}, {"workers": 4}, {"workers": 3, "max_memory": "8MiB"})):
        dora_convert.merge(base.path, dora, tmp_path / f"out{number}", device=device, undo=undo, **options)
    twice = "auto" if REHEARSED else "cuda:0,0"
    dora_convert.merge(base.path, dora, tmp_path / "out3", device=twice, undo=undo)
    assert len({tuple(sorted(contents(tmp_path / f"out{number}").items())) for number in range(4)}) == 1


def test_all_cards(tmp_path, base, dora, device):
    """auto takes all cards, and their bytes are those of one."""
    dora_convert.merge(base.path, dora, tmp_path / "all", device="auto", workers=8)
    dora_convert.merge(base.path, dora, tmp_path / "one", device=device)
    assert contents(tmp_path / "all") == contents(tmp_path / "one")


def test_embeddings_and_replacements(tmp_path, device, base):
    """Two passes, saved modules, and several adapters."""
    extra = embeddings_and_head()
    one = make_adapter(tmp_path / "one", base, dora=True, extra=extra)
    adapters = [one, make_adapter(tmp_path / "two", base, dora=False, seed=8)]
    for where in (device, "cpu"):
        assert dora_convert.merge(base.path, adapters, tmp_path / where, device=where).verified.wrong_elements == 0
    same(load(tmp_path / device), load(tmp_path / "cpu"))


@pytest.mark.parametrize("case", KINDS)
def test_every_kind(tmp_path, device, case):
    """Every kind of adapter gives what it gives on a processor, and verify agrees on both."""
    base = base_of(case)
    for where in (device, "cpu"):
        assert not dora_convert.merge(base, GOLDEN / case, tmp_path / where, device=where).verified.wrong_elements
        assert dora_convert.verify(base, GOLDEN / case, tmp_path / device, device=where).verdict == "agree"
    same(load(tmp_path / device), load(tmp_path / "cpu"))


@pytest.mark.parametrize("method", ["chain", "linear", "ties", "dare", "della", "magnitude-prune"])
def test_methods(tmp_path, device, base, method):
    """Methods that combine adapters: the check finds nothing wrong, and verify agrees."""
    adapters = [make_adapter(tmp_path / f"{seed}", base, dora=True, seed=seed) for seed in (3, 4)]
    options = {"method": method, **({} if method in ("chain", "linear") else {"density": 0.5})}
    report = dora_convert.merge(base.path, adapters, tmp_path / "out", device=device, **options)
    assert report.verified.wrong_elements == 0
    assert dora_convert.verify(base.path, adapters, tmp_path / "out", device=device, **options).verdict == "agree"


@pytest.mark.parametrize("undo", ["norms", "exact"])
def test_unmerge(tmp_path, device, base, dora, undo):
    """An exact record gives the base back bit for bit, on the device and on a processor, wherever it was made."""
    dora_convert.merge(base.path, dora, tmp_path / "out", device=device, undo=undo)
    dora_convert.merge(base.path, dora, tmp_path / "here", device="cpu", undo=undo)
    for merged in ("out", "here"):
        for where in (device, "cpu"):
            back = tmp_path / f"{merged} on {where}"
            report = dora_convert.unmerge(tmp_path / merged, dora, back, device=where)
            assert report.exact["bit_exact"] == report.exact["tensors"] or undo == "norms"
            if undo == "exact":
                assert all(torch.equal(tensor, load(base.path)[name]) for name, tensor in load(back).items())


def test_in_place(tmp_path, device, base, dora):
    """A checkpoint is changed where it is, and back."""
    before = load(base.path)
    dora_convert.merge(base.path, dora, in_place=True, device=device, undo="exact")
    same(load(base.path), {name: rounded(x, torch.bfloat16) for name, x in exact(base, dora).items()})
    dora_convert.unmerge(base.path, dora, in_place=True, device=device)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load(base.path).items())


def test_verify(tmp_path, device, base, dora):
    """Every element compared on the device: what is right agrees, and one element that is off is found."""
    dora_convert.merge(base.path, dora, tmp_path / "out")
    assert dora_convert.verify(base.path, dora, tmp_path / "out", device=device).verdict == "agree"
    path = tmp_path / "out/model-00001-of-00002.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name].view(torch.int16)[3, 5] += 2
    save_file(tensors, path, {"format": "pt"})
    report = dora_convert.verify(base.path, dora, tmp_path / "out", device=device)
    assert report.verdict == "differ"
    assert [module.name for module in report.modules if module.wrong_elements] == [name]


def test_adapters_out(tmp_path, device, base, dora):
    """to-lora, extract and from-lora make adapters whose merges are what they are made from."""
    dora_convert.merge(base.path, dora, tmp_path / "out", device=device, dtype="float32")
    lora = dora_convert.to_lora(base.path, dora, tmp_path / "lora", rank=72, device=device)
    assert lora.relative_error < 1e-4
    for kind in ("lora", "dora"):
        report = dora_convert.extract(
            base.path, tmp_path / "out", tmp_path / f"extracted {kind}", rank=24, kind=kind, device=device
        )
        assert report.modules
    plain = make_adapter(tmp_path / "plain", base, dora=False)
    report = dora_convert.from_lora(base.path, plain, tmp_path / "made", device=device)
    assert report.relative_error < 1e-6
    kept = dora_convert.verify(base.path, tmp_path / "made", _merged(tmp_path, base, plain, device), device=device)
    assert kept.verdict == "agree"


def _merged(tmp_path, base, adapter, device):
    """A merge in float32, which shows small differences."""
    dora_convert.merge(base.path, adapter, tmp_path / "kept", device=device)
    return tmp_path / "kept"


def test_analyze(tmp_path, device, base, dora):
    """The same figures as on a processor."""
    dora_convert.merge(base.path, dora, tmp_path / "out")
    there = dora_convert.analyze(base.path, tmp_path / "out", device=device).to_dict()["points"]
    here = dora_convert.analyze(base.path, tmp_path / "out", device="cpu").to_dict()["points"]
    for one, other in zip(there, here, strict=True):
        numbers = {key: value for key, value in other.items() if isinstance(value, float)}
        assert {key: one[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)


def test_in_memory(tmp_path, device, base, dora):
    """iter_merged and merge_state_dict give the bytes of merge; tensors stay on their device."""
    dora_convert.merge(base.path, dora, tmp_path / "out", device=device)
    want = load(tmp_path / "out")
    got = dict(dora_convert.iter_merged(base.path, dora, device=device))
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    state = {name: tensor.to(CARD) for name, tensor in base.tensors.items()}
    merged = dora_convert.merge_state_dict(state, dora, device=device)
    assert all(torch.equal(merged[name].cpu(), tensor) for name, tensor in want.items())
    assert {tensor.device.type for tensor in merged.values()} == {CARD.type}


@pytest.mark.parametrize("kind", sorted(quantised.TRUTH.keys() - {"gpt-oss"}))
def test_quantised_bases(tmp_path, device, kind):
    """Decoded on the device, merged, and rounded once."""
    base = quantised.copy_base(kind, tmp_path / "base")
    adapter = quantised.make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base, adapter, tmp_path / "there", dequantize=True, device=device)
    dora_convert.merge(base, adapter, tmp_path / "here", dequantize=True, device="cpu")
    same(load(tmp_path / "there"), load(tmp_path / "here"))


def test_faults(tmp_path, device):
    """An overflow is an error, and nothing is published."""
    base = make_base(tmp_path / "base", torch.float16)
    adapter = make_adapter(tmp_path / "adapter", base, dora=False, lora_alpha=10**9)
    with pytest.raises(NumericalError, match="overflows F16"):
        dora_convert.merge(base.path, adapter, tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(REHEARSED, reason="models run where they always do")
def test_outputs(tmp_path):
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
