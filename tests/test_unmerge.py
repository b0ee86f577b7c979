"""unmerge: the base from what was merged; what is known of it is checked, what is not is said."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import UsageError

from .test_resume import interrupted
from .test_undo_exact import bits, same_as
from .toy import HIDDEN, contents, load, make_adapter, make_base, rounded, stopped


@pytest.fixture
def merged(tmp_path, base, adapter):
    """An exact merge of a DoRA."""
    dora_convert.merge(base.path, adapter, tmp_path / "merged", undo="exact")
    return tmp_path / "merged"


def test_whatever_made_the_record(tmp_path, base, adapter):
    """Workers, memory and a resumption, at the merge and at its undoing, leave no trace in the recovered base."""
    for number, (before, after) in enumerate(
        [({"workers": 1}, {"workers": 3, "max_memory": "1MB"}), ({"max_memory": "1MB"}, {"workers": 1})]
    ):
        out, again = tmp_path / f"out{number}", tmp_path / f"again{number}"
        interrupted(base, adapter, out, undo="exact")
        report = dora_convert.merge(base.path, adapter, out, undo="exact", **before)
        assert report.resumed
        with stopped():
            dora_convert.unmerge(out, adapter, again, workers=1)
        report = dora_convert.unmerge(out, adapter, again, **after)
        assert report.resumed
        same_as(base.path, again)
    assert contents(tmp_path / "out0") == contents(tmp_path / "out1")


def test_blocks_of_another_height(tmp_path, merged, base, adapter, monkeypatch):
    """The record serves a version that cuts its blocks otherwise: predictions do not depend on them."""
    from dora_convert.storage import reader as blocks

    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 9)
    dora_convert.unmerge(merged, adapter, tmp_path / "again")
    same_as(base.path, tmp_path / "again")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_dtype_and_other_shards(tmp_path, dtype):
    """A merge that converts and cuts anew is undone to the base's own dtype and files."""
    base = make_base(tmp_path / "base", torch.float16 if dtype == "bfloat16" else torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    options = {"undo": "exact", "dtype": dtype, "max_shard_size": 30000}
    dora_convert.merge(base.path, adapter, tmp_path / "out", **options)
    report = dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "again")
    same_as(base.path, tmp_path / "again")
    assert report.exact["tensors"] == report.exact["bit_exact"] == len(base.tensors)


def test_several_adapters(tmp_path, base):
    """Three adapters at their weights come out as a whole, in whatever order they are named."""
    first = make_adapter(tmp_path / "first", base, dora=False, seed=2)
    second = make_adapter(tmp_path / "second", base, dora=True, seed=4, targets=["k_proj", "up_proj"])
    third = make_adapter(tmp_path / "third", base, dora=True, seed=6)
    weight = (0.7, -0.4, 1.5)
    dora_convert.merge(base.path, [first, second, third], tmp_path / "out", weight=weight, undo="exact")
    dora_convert.unmerge(tmp_path / "out", [third, first, second], tmp_path / "again")
    same_as(base.path, tmp_path / "again")
    with pytest.raises(UsageError, match="was merged with second, too, and not all"):
        dora_convert.unmerge(tmp_path / "out", [first, third], tmp_path / "fewer")


def test_norms_are_right_up_to_rounding(tmp_path):
    """With norms alone every element is the nearest to what float64 makes of W', and what cannot be known is counted."""
    base = make_base(tmp_path / "base", torch.float16)
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    report = dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "again")
    assert report.verified.wrong_elements == 0
    merged, got, tensors = (
        load(tmp_path / "out"),
        load(tmp_path / "again"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    modules = {module.name: module for module in report.modules}
    for name, W in base.tensors.items():
        if name not in modules:
            assert torch.equal(got[name], W)
            continue
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        change = 1.5 * tensors[f"{prefix}.lora_B.weight"].double() @ tensors[f"{prefix}.lora_A.weight"].double()
        n = (W.double() + change).norm(dim=1).float().double()
        m = tensors[f"{prefix}.lora_magnitude_vector"].double()
        want = merged[name].double() * (n / m)[:, None] - change
        assert torch.equal(got[name], rounded(want, torch.float16)), name
        wrong = int((got[name] != W).sum())
        assert not modules[name].bit_exact
        assert 0 < wrong <= modules[name].lost * 1.02 + 3, name
        assert modules[name].lost < W.numel() / 2


def test_replaced_rows_and_files(tmp_path, base):
    """Saved heads, trained tokens, tokenizer and README come back; an adapter's own files go."""
    extra = {"base_model.model.lm_head.weight": torch.randn(72, HIDDEN)}
    adapter = make_adapter(tmp_path / "adapter", base, dora=True, extra=extra, modules_to_save=["lm_head"])
    (adapter / "tokenizer_config.json").write_text("{}")
    (adapter / "added_tokens.json").write_text("{}")
    for undo in ("norms", "exact"):
        dora_convert.merge(base.path, adapter, tmp_path / undo, undo=undo)
        again = tmp_path / f"{undo} again"
        dora_convert.unmerge(tmp_path / undo, adapter, again)
        assert torch.equal(bits(load(again)["lm_head.weight"]), bits(base.tensors["lm_head.weight"]))
        files = {name: data for name, data in contents(again).items() if not name.endswith(".safetensors")}
        assert files == {n: d for n, d in contents(base.path).items() if not n.endswith(".safetensors")}


@pytest.mark.parametrize("rows", [63, 81])
def test_another_vocabulary(tmp_path, base, rows):
    """Rows that were added go, and rows that were cut off come back."""
    extra = {}
    for name in ("model.embed_tokens", "lm_head"):
        value = torch.randn(rows, HIDDEN).bfloat16()
        value[:50] = base.tensors[f"{name}.weight"][:50]
        extra[f"base_model.model.{name}.weight"] = value
    adapter = make_adapter(tmp_path / "adapter", base, dora=True, extra=extra)
    dora_convert.merge(base.path, adapter, tmp_path / "out", undo="exact")
    assert load(tmp_path / "out")["lm_head.weight"].shape == (rows, HIDDEN)
    kept = load_file(tmp_path / "out/dora_convert/undo.safetensors")["index/lm_head.weight"]
    assert kept.tolist() == list(range(50, 72))
    report = dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "again")
    same_as(base.path, tmp_path / "again")
    assert report.exact["tensors"] == report.exact["bit_exact"] == 8


def test_stacked_merges(tmp_path, base, adapter, merged):
    """A merge of a merged base is undone to that base with its record, which is then undone itself."""
    second = make_adapter(tmp_path / "second", base, dora=True, seed=9)
    dora_convert.merge(merged, second, tmp_path / "twice", undo="exact")
    dora_convert.unmerge(tmp_path / "twice", second, tmp_path / "once")
    assert contents(tmp_path / "once") == contents(merged)
    dora_convert.unmerge(tmp_path / "once", adapter, tmp_path / "never")
    same_as(base.path, tmp_path / "never")


def test_what_cannot_be_inverted_is_kept(tmp_path, base):
    """Rows that a magnitude of zero wipes out, and those that cancel, come back from the record."""
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    m = tensors["base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"]
    m[3], m[4], m[5] = 0, 1e-30, -m[5]
    save_file(tensors, adapter / "adapter_model.safetensors")
    dora_convert.merge(base.path, adapter, tmp_path / "out", undo="exact")
    assert load(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"][3].count_nonzero() == 0
    dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "again")
    same_as(base.path, tmp_path / "again")
    # weights of ½ on two DoRAs whose norms cancel the base's share
    second = make_adapter(tmp_path / "second", base, dora=True, seed=5)
    dora_convert.merge(base.path, [adapter, second], tmp_path / "half", weight=(1, -1), undo="exact")
    dora_convert.unmerge(tmp_path / "half", [adapter, second], tmp_path / "half again")
    same_as(base.path, tmp_path / "half again")


def test_negative_zeros_and_subnormals(tmp_path):
    """Bits, not values: −0 stays −0, and the smallest numbers stay what they are."""
    base = make_base(tmp_path / "base", torch.float16, shards=1)
    W = base.tensors["model.layers.0.mlp.up_proj.weight"]
    W[0, :8] = torch.tensor([-0.0, 0.0, 6e-8, -6e-8, 1e-6, -1e-6, 65504.0, -0.0]).half()
    save_file(base.tensors, base.path / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"][0] *= 1e-5
    save_file(tensors, adapter / "adapter_model.safetensors")
    dora_convert.merge(base.path, adapter, tmp_path / "out", undo="exact")
    dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "again")
    same_as(base.path, tmp_path / "again")
