"""The refusals, checks and reports of a merge."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import NumericalError, OutputError, UsageError, VerificationError

from .test_merge import same
from .toy import ALPHA, RANK, contents, exact, load, make_adapter, rounded, write_shards  # fmt: skip


def test_dry_run_reads_headers_and_writes_nothing(tmp_path, base, adapter):
    """A dry run reports the plan; it needs no tensor, so even a damaged adapter passes."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, adapter / "adapter_model.safetensors")
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert report.plan["tensors"] == len(base.tensors)
    assert report.plan["shards"] == 2
    assert report.plan["bytes_out"] == sum(tensor.nbytes for tensor in base.tensors.values())
    assert report.plan["undo_bytes"] > 0
    assert 0 < report.plan["least_memory"] <= report.plan["memory"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_adapter(tmp_path, base, adapter, value):
    """NaN and Inf in the adapter are found before the first byte is written, by name."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name][3, 1] = value
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(NumericalError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert [fault.what for fault in caught.value.faults] == [name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_damaged_base(tmp_path, base, adapter):
    """NaN in a base tensor that is merged is the base's fault; in one that is copied it stays as it is."""
    base.tensors["model.norm.weight"][0] = float("nan")
    write_shards(base.path, base.tensors, 2)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    base.tensors["model.layers.0.mlp.up_proj.weight"][2, 2] = float("nan")
    write_shards(base.path, base.tensors, 2)
    with pytest.raises(NumericalError, match=r"BASE's tensor model.layers.0.mlp.up_proj.weight holds NaN"):
        dora_convert.merge(base.path, adapter, tmp_path / "out2")
    assert not list(tmp_path.glob("out2*"))


def test_overflow(tmp_path, base, adapter):
    """A result that the dtype cannot hold is an error that names the tensor, also where a tensor is only converted."""
    base.tensors["model.norm.weight"][0] = 1e5
    write_shards(base.path, base.tensors, 2)
    with pytest.raises(NumericalError, match=r"model\.norm\.weight overflows F16"):
        dora_convert.merge(base.path, adapter, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.glob("out*"))


def test_infinity_survives_a_conversion(tmp_path, base, adapter):
    """A mask of -inf in the base is not an overflow."""
    base.tensors["mask"] = torch.full((3, 3), float("-inf"), dtype=torch.bfloat16)
    write_shards(base.path, base.tensors, 2)
    dora_convert.merge(base.path, adapter, tmp_path / "out", dtype="float16")
    assert (load(tmp_path / "out")["mask"] == float("-inf")).all()


def test_zero_norm(tmp_path, base, adapter):
    """A row that is zero has no direction: m/‖V‖ is undefined, and said to be."""
    base.tensors["model.layers.0.mlp.up_proj.weight"][7] = 0
    write_shards(base.path, base.tensors, 2)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"][7] = 0
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(NumericalError, match="weights are all zero"):
        dora_convert.merge(base.path, adapter, tmp_path / "out")


def test_another_base_is_doubted(tmp_path, base, adapter):
    """Magnitudes far from the base's norms are a warning, and only then."""
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert not any("another base" in text for text in report.warnings)
    for name in base.tensors:
        base.tensors[name] = base.tensors[name] * 3
    write_shards(base.path, base.tensors, 2)
    notices = []
    report = dora_convert.merge(base.path, adapter, tmp_path / "out2", on_notice=notices.append)
    assert any("another base" in text for text in report.warnings)
    assert any("another base" in text for text in notices)


def test_existing_out(tmp_path, base, adapter):
    """An existing OUT is refused before any work; --overwrite replaces a merge of ours and nothing else."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputError) as caught:
        dora_convert.merge(base.path, adapter, out)
    assert "overwrite=" not in caught.value.hint
    with pytest.raises(OutputError, match="was not written by dora-convert"):
        dora_convert.merge(base.path, adapter, out, overwrite=True)
    (out / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="no record shows"):
        dora_convert.merge(base.path, adapter, out, overwrite=True)
    assert (out / "precious.txt").read_text() == "mine"
    shutil.rmtree(out)
    dora_convert.merge(base.path, adapter, out)
    with pytest.raises(OutputError) as caught:
        dora_convert.merge(base.path, adapter, out)
    assert "overwrite=True" in caught.value.hint
    dora_convert.merge(base.path, adapter, out, overwrite=True)
    same(load(out), exact(base, adapter), torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize("where", ["base", "base/inside", "adapter/inside", "."])
def test_out_may_not_overlap_an_input(tmp_path, base, adapter, where):
    """OUT is neither an input, nor inside one, nor around one."""
    before = contents(tmp_path)
    with pytest.raises(OutputError):
        dora_convert.merge(base.path, adapter, tmp_path / where, overwrite=True)
    assert contents(tmp_path) == before


def test_self_check_finds_a_wrong_byte(tmp_path, base, adapter, monkeypatch):
    """The self-check reads the disk: one flipped bit in a sampled row fails the merge, and nothing is published."""
    from dora_convert.output.shards import ShardFiles

    write = ShardFiles.write

    def flip(self, item, offset, data):
        if item.name == "model.layers.1.mlp.down_proj.weight" and offset == 0:
            data = bytearray(data)
            data[1] ^= 0x10
            data = memoryview(data)
        write(self, item, offset, data)

    monkeypatch.setattr(ShardFiles, "write", flip)
    with pytest.raises(VerificationError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert [fault.what for fault in caught.value.faults] == ["model.layers.1.mlp.down_proj.weight"]
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ShardFiles, "write", write)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert report.resumed
    same(load(tmp_path / "out"), exact(base, adapter), torch.bfloat16)


def test_no_verify_checks_nothing(tmp_path, base, adapter):
    """--no-verify reports that nothing was verified."""
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", verify=False)
    assert report.verified is None
    assert report.lost is None


def test_float32_arithmetic_stays_within_the_bound(tmp_path, base, adapter):
    """--compute-dtype float32 is close to float64 and passes the self-check."""
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", compute_dtype="float32")
    assert report.compute_dtype == "float32"
    assert report.verified.wrong_elements == 0
    got, want = load(tmp_path / "out"), exact(base, adapter)
    off = sum((got[name] != rounded(x, torch.bfloat16)).sum().item() for name, x in want.items())
    assert off / sum(x.numel() for x in want.values()) < 1e-3


def test_too_little_memory_names_the_least(tmp_path, base, adapter):
    """A budget too small for one block is refused with the least that works, and that works; dry runs know it, too."""
    for dry_run in (True, False):
        with pytest.raises(UsageError) as caught:
            dora_convert.merge(base.path, adapter, tmp_path / "out", max_memory="10KB", dry_run=dry_run)
    least = re.search(r"\d+[KMG]iB", caught.value.hint)[0]
    dora_convert.merge(base.path, adapter, tmp_path / "out", max_memory=least)


def test_callers_settings_survive(tmp_path, base, adapter):
    """Thread count, default dtype, random state and matmul precision are as they were."""
    torch.set_num_threads(2)
    state, precision = torch.random.get_rng_state(), torch.get_float32_matmul_precision()
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert torch.get_num_threads() == 2
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision


def test_progress_counts_every_byte(tmp_path, base, adapter):
    """on_progress ends at the number of bytes written, and never goes back."""
    seen = []
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", on_progress=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (report.bytes_written, report.bytes_written)


def test_rslora_and_patterns(tmp_path, base):
    """alpha/√r, and the first pattern in the order of the file."""
    adapter = make_adapter(
        tmp_path / "adapter", base, dora=True, use_rslora=True,
        alpha_pattern={"layers.1.mlp.up_proj": 3, "up_proj": 12, "layers.0.mlp.up_proj": 99},
    )  # fmt: skip
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    got = load(tmp_path / "out")
    for pattern, alpha in (("0.mlp.up_proj", 12), ("1.mlp.up_proj", 3), ("0.mlp.down_proj", ALPHA)):
        name = f"model.layers.{pattern}.weight"
        want = exact(base, adapter, scale=alpha / RANK**0.5)[name]
        assert torch.equal(got[name], rounded(want, torch.bfloat16))


def test_systems_without_positional_io(tmp_path, base, adapter):
    """Windows has neither preadv nor pwrite, macOS no copy_file_range: the same bytes by plainer calls."""
    code = """
import os, sys
for name in ("preadv", "pwrite", "copy_file_range", "posix_fallocate", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
import dora_convert
dora_convert.merge(*sys.argv[1:])
"""
    command = [sys.executable, "-c", code, str(base.path), str(adapter), str(tmp_path / "plain")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert contents(tmp_path / "plain") == contents(tmp_path / "out")


def test_copying_outside_the_kernel(tmp_path, base, adapter, monkeypatch):
    """If the kernel cannot copy between two file systems, bytes are read and written."""

    def refuses(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if hasattr(os, "copy_file_range"):
        monkeypatch.setattr(os, "copy_file_range", refuses)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    same(load(tmp_path / "out"), exact(base, adapter), torch.bfloat16)


def test_one_adapter_twice_is_said(tmp_path, base, adapter):
    """It counts twice, as asked, and never silently."""
    report = dora_convert.merge(base.path, [adapter, adapter], tmp_path / "out", dry_run=True)
    assert sum("is given 2 times" in warning for warning in report.warnings) == 1
