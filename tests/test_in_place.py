"""In place: the same bytes as beside it, whatever kills it; refused where it would harm other files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import NumericalError, RefError, UnsupportedError, UsageError

from . import toy
from .toy import contents, make_adapter, make_base, stopped

DRIVER = Path(__file__).parent / "killed_in_place.py"


@pytest.fixture
def model(tmp_path):
    """A checkpoint to change, and a DoRA for it."""
    base = make_base(tmp_path / "model", layers=3)
    return base, make_adapter(tmp_path / "adapter", base, dora=True)


def weights(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors") and "/" not in name}


def test_there_and_back(tmp_path, model):
    """In place gives the weights, the record and the config that a merge beside it gives; and the base again, all of it."""
    base, adapter = model
    before = contents(base.path)
    dora_convert.merge(base.path, adapter, tmp_path / "out", undo="exact")
    report = dora_convert.merge(base.path, adapter, in_place=True)
    assert contents(base.path) == contents(tmp_path / "out") | {
        name: data for name, data in contents(base.path).items() if name in ("README.md", "dora_convert/receipt.json")
    }
    assert report.undo == "exact"
    assert report.verified.wrong_elements == 0
    back = dora_convert.unmerge(base.path, adapter, in_place=True)
    assert contents(base.path) == before
    assert back.exact["tensors"] == back.exact["bit_exact"] == 9


def test_touched_tensors_only(model):
    """No other byte of a shard is written."""
    base, adapter = model
    report = dora_convert.merge(base.path, adapter, in_place=True)
    touched = [name for name in base.tensors if name.removesuffix(".weight").endswith(toy.TARGETS)]
    assert report.bytes_written == sum(base.tensors[name].nbytes for name in touched)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_killed_at_any_moment(tmp_path, verb, model):
    """Killed at 20 moments, some twice: meanwhile it is no model or a whole one, and a rerun ends in the same bytes."""
    base, adapter = model
    (tmp_path / "work").mkdir()
    if verb == "unmerge":
        dora_convert.merge(base.path, adapter, in_place=True)
    base.path.rename(tmp_path / "work/before")
    command = [sys.executable, str(DRIVER), verb, str(tmp_path / "work"), str(adapter), "20"]
    environment = os.environ | {"PYTHONPATH": str(DRIVER.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    before, whole = contents(tmp_path / "work/before"), contents(tmp_path / "work/whole")
    assert weights(tmp_path / "work/before") != weights(tmp_path / "work/whole")
    states = set()
    for number, death in enumerate(found["deaths"]):
        states.add(death["state"])
        left = weights(tmp_path / f"work/seen{number}") if death["state"] == "model" else None
        assert left in (None, weights(tmp_path / "work/before"), weights(tmp_path / "work/whole")), death
        if death["again"]:  # all was done but for the end of the process: once more is refused
            assert death["last"] == "model", (death, done.stderr)
        got = contents(tmp_path / f"work/killed{number}")
        expected = dict(whole)
        for name in ("README.md", "dora_convert/receipt.json"):  # they say the folder's name
            if verb == "merge":
                expected.pop(name)
                got.pop(name)
        assert got == expected, death
    assert states == {"model", "unfinished"}
    assert before != whole


def test_unfinished_is_no_model(tmp_path, model):
    """A folder interrupted in the middle is neither merged, verified nor inspected; the same command resumes."""
    base, adapter = model
    dora_convert.merge(base.path, adapter, tmp_path / "out", undo="exact")
    with stopped():
        dora_convert.merge(base.path, adapter, in_place=True, workers=1)
    for use in (
        lambda: dora_convert.merge(base.path, adapter, tmp_path / "other"),
        lambda: dora_convert.verify(tmp_path / "out", adapter, base.path),
        lambda: dora_convert.inspect(base.path),
    ):
        with pytest.raises(RefError, match="being changed in place"):
            use()
    assert dora_convert.merge(base.path, adapter, in_place=True).resumed
    assert weights(base.path) == weights(tmp_path / "out")


def test_what_cannot_be_merged_changes_nothing(model):
    """An overflow in the last tensor shows before the first byte is written."""
    base, adapter = model
    half = {name: tensor.half() for name, tensor in base.tensors.items()}
    for path in base.path.glob("*.safetensors*"):
        path.unlink()
    toy.write_shards(base.path, half, 1)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.2.mlp.up_proj.lora_magnitude_vector"].mul_(1e6)
    save_file(tensors, adapter / "adapter_model.safetensors")
    before = contents(base.path)
    with pytest.raises(NumericalError, match="overflows"):
        dora_convert.merge(base.path, adapter, in_place=True)
    assert contents(base.path) == before


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"max_shard_size": 20000}])
def test_other_headers_are_refused(model, options):
    """A merge that changes a header is refused in place."""
    base, adapter = model
    before = contents(base.path)
    with pytest.raises(UnsupportedError, match="cannot be changed in place"):
        dora_convert.merge(base.path, adapter, in_place=True, **options)
    assert contents(base.path) == before


def test_added_and_resized_are_refused(tmp_path, model):
    """So are a tensor more, and one of another size."""
    base, _ = model
    grown = torch.randn(80, toy.HIDDEN)
    for number, saved in enumerate(({"score": grown}, {"model.embed_tokens": grown, "lm_head": grown + 1})):
        extra = {f"base_model.model.{name}.weight": tensor for name, tensor in saved.items()}
        modules = [name.rpartition(".")[2] for name in saved]
        adapter = make_adapter(tmp_path / f"{number}", base, dora=False, extra=extra, modules_to_save=modules)
        before = contents(base.path)
        with pytest.raises(UnsupportedError, match="cannot be changed in place"):
            dora_convert.merge(base.path, adapter, in_place=True)
        assert contents(base.path) == before


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_refused(tmp_path, model, link):
    """A file that others see under another name stays as it is, as in a Hub cache."""
    base, adapter = model
    shard = min(base.path.glob("*.safetensors"))
    shard.rename(tmp_path / "blob")
    link(tmp_path / "blob", shard)
    before = contents(base.path)
    with pytest.raises(UnsupportedError) as caught:
        dora_convert.merge(base.path, adapter, in_place=True)
    assert shard.name in caught.value.text()
    assert contents(base.path) == before


def test_lossy_only_if_asked(model):
    """Without an exact record there is no way back: that takes --allow-lossy."""
    base, adapter = model
    with pytest.raises(UsageError, match="would lose"):
        dora_convert.merge(base.path, adapter, in_place=True, undo="norms")
    dora_convert.merge(base.path, adapter, in_place=True, allow_lossy=True)
    with pytest.raises(UsageError, match="would lose"):
        dora_convert.unmerge(base.path, adapter, in_place=True)
    report = dora_convert.unmerge(base.path, adapter, in_place=True, allow_lossy=True)
    assert report.undo == "norms"
    assert not (base.path / "dora_convert").exists()


def test_once_more_changes_nothing(model):
    """Who cannot tell whether a command had ended runs it again: a finished one is not done twice."""
    base, adapter = model
    dora_convert.merge(base.path, adapter, in_place=True)
    merged = contents(base.path)
    with pytest.raises(UsageError, match="already"):
        dora_convert.merge(base.path, adapter, in_place=True)
    assert contents(base.path) == merged
    dora_convert.unmerge(base.path, adapter, in_place=True)
    before = contents(base.path)
    with pytest.raises(UsageError, match="nothing to undo"):
        dora_convert.unmerge(base.path, adapter, in_place=True, allow_lossy=True)
    assert contents(base.path) == before


def test_an_edited_model_is_not_unmerged_in_place(model):
    """MERGED that was changed since is refused before anything is written."""
    base, adapter = model
    dora_convert.merge(base.path, adapter, in_place=True)
    shard = min(base.path.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["model.layers.2.mlp.down_proj.weight"][-1, -1] += 1
    save_file(tensors, shard, {"format": "pt"})
    before = contents(base.path)
    with pytest.raises(RefError, match="is not what was written") as caught:
        dora_convert.unmerge(base.path, adapter, in_place=True)
    assert [fault.what for fault in caught.value.faults] == ["model.layers.2.mlp.down_proj.weight"]
    assert contents(base.path) == before


def test_out_is_not_given(tmp_path, model):
    """--in-place and OUT are two answers to one question."""
    base, adapter = model
    with pytest.raises(UsageError, match="no OUT"):
        dora_convert.merge(base.path, adapter, tmp_path / "out", in_place=True)
    with pytest.raises(UsageError, match="no OUT"):
        dora_convert.unmerge(base.path, adapter, tmp_path / "out", in_place=True)
    with pytest.raises(UsageError, match="in_place=True"):
        dora_convert.merge(base.path, adapter)


@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_options_that_say_nothing(model, verb):
    """A repo on the Hub is refused before it is looked for, --overwrite too; --allow-lossy is refused elsewhere."""
    base, adapter = model
    call = getattr(dora_convert, verb)
    with pytest.raises(UsageError, match="org/base is on the Hub"):
        call("org/base", adapter, in_place=True)
    with pytest.raises(UsageError, match="no OUT that overwrite=True"):
        call(base.path, adapter, in_place=True, overwrite=True)
    with pytest.raises(UsageError, match="allow_lossy=True goes with"):
        call(base.path, adapter, base.path.with_name("out"), allow_lossy=True)


def test_swapped(model):
    """The hint for BASE and ADAPTER in the wrong order is a command in place, too."""
    base, adapter = model
    with pytest.raises(UsageError, match="swapped") as caught:
        dora_convert.merge(adapter, base.path, in_place=True)
    assert caught.value.hint == f"dora-convert merge {base.path} {adapter} --in-place"
