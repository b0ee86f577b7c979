"""Small weights that are merged together have the bytes, and the records, that they have when merged alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.engine import stacked
from dora_convert.engine.stacked import StackedMerge
from dora_convert.errors import NumericalError
from dora_convert.maths.stack import merge_stack
from dora_convert.output import finished
from dora_convert.storage import reader

from .toy import contents, exact, load, make_adapter, make_base, rounded

EVERY = ("q_proj", "k_proj", "up_proj", "down_proj")


@pytest.fixture
def merged(monkeypatch):
    """Names of the weights that were merged together, stack by stack; groups of tensors are made of few."""
    monkeypatch.setattr(finished, "GROUPS", 1)
    results, found = StackedMerge.results, []

    def noted(self, weights):
        found.append([weight.name for weight in weights])
        return results(self, weights)

    monkeypatch.setattr(StackedMerge, "results", noted)
    return found


def folder_of(out):
    """The files of an output; of its receipt all but what a run differs in."""
    files = contents(out)
    name = next(name for name in files if name.endswith("receipt.json"))
    receipt = json.loads(files.pop(name))
    return files, {key: value for key, value in receipt.items() if key not in ("created", "seconds", "command")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("undo", ["norms", "exact", "none"])
def test_together_as_alone(tmp_path, monkeypatch, merged, dtype, undo):
    """DoRAs and LoRAs of four shapes: shards and undo records are the same, and right."""
    base = make_base(tmp_path / "base", dtype, layers=4)
    dora = make_adapter(tmp_path / "dora", base, dora=True, targets=EVERY[:3])
    lora = make_adapter(tmp_path / "lora", base, dora=False, targets=EVERY[3:])
    dora_convert.merge(base.path, [dora, lora], tmp_path / "together", workers=1, undo=undo)
    assert bool(merged) == (undo != "exact")  # an exact record looks at each weight while it is merged
    assert not merged or max(map(len, merged)) > 1
    monkeypatch.setattr(stacked, "stacks", lambda *_: ())
    dora_convert.merge(base.path, [dora, lora], tmp_path / "alone", workers=1, undo=undo)
    assert folder_of(tmp_path / "together") == folder_of(tmp_path / "alone")
    got = load(tmp_path / "together")
    for adapter in (dora, lora):
        for name, x in exact(base, adapter).items():
            if not torch.equal(x, base.tensors[name].double()):
                assert torch.equal(got[name], rounded(x, dtype)), name


def test_blocks_hold_whole_weights(tmp_path, monkeypatch, merged):
    """No more weights than a block holds are computed at a time, and a weight of several blocks is alone."""
    monkeypatch.setattr(reader, "BLOCK_ELEMENTS", 2000)
    together = []

    def noted(scratch, **others):
        together.append(len(scratch[1]))
        return merge_stack(scratch=scratch, **others)

    monkeypatch.setattr(stacked, "merge_stack", noted)
    base = make_base(tmp_path / "base", layers=5)
    adapter = make_adapter(tmp_path / "adapter", base, dora=True, targets=EVERY)
    dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1)
    sizes = {base.tensors[names[0]].numel(): len(names) for names in merged}
    assert set(sizes) == {960, 1600}  # the others have more elements than a block
    assert max(sizes.values()) == 3
    assert set(together) == {1, 2}
    assert all(
        torch.equal(load(tmp_path / "out")[name], rounded(x, torch.bfloat16))
        for name, x in exact(base, adapter).items()
    )


def test_weights_that_are_not_aligned_are_alone(tmp_path, merged):
    """A product's bits may depend on where its operands begin: with rank 3, they would begin elsewhere."""
    base = make_base(tmp_path / "base", layers=4)
    adapter = make_adapter(tmp_path / "adapter", base, dora=True, targets=EVERY)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    tensors = load_file(adapter / "adapter_model.safetensors")
    cut = {name: (x[:3] if "lora_A" in name else x[:, :3] if "lora_B" in name else x) for name, x in tensors.items()}
    save_file({name: x.contiguous() for name, x in cut.items()}, adapter / "adapter_model.safetensors")
    dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1)
    assert not merged


def test_what_is_not_finite_is_named(tmp_path, merged):
    """One weight of a stack overflows: the error names it, as it does for a weight alone."""
    base = make_base(tmp_path / "base", torch.float16, layers=4)
    adapter = make_adapter(tmp_path / "adapter", base, dora=False, targets=EVERY)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.2.self_attn.k_proj.lora_B" in name)
    tensors[name][3, 1] = 3e38
    save_file(tensors, file)
    with pytest.raises(NumericalError, match=r"layers\.2\.self_attn\.k_proj"):
        dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1)
    assert merged
    assert not (tmp_path / "out").exists()
