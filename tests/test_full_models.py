"""Fine-tuned checkpoints as inputs of merge: other dtypes and shards than the base's, and tensors that are missing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import dora_convert

from .toy import load, make_base, write_shards

GONE = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def models(tmp_path):
    """A bfloat16 base in two shards; tuned in float32, in one file; tuned in float16, in three, without one weight."""
    base = make_base(tmp_path / "base", torch.bfloat16, layers=1)
    torch.manual_seed(8)
    tuned = [{name: x.float() + torch.randn(x.shape) * 0.02 for name, x in base.tensors.items()} for _ in range(2)]
    tuned[1] = {name: x.half() for name, x in tuned[1].items() if name != GONE}
    for number in range(2):
        (tmp_path / f"tuned{number}").mkdir()
        (tmp_path / f"tuned{number}/config.json").write_text((base.path / "config.json").read_text())
    save_file(tuned[0], tmp_path / "tuned0/model.safetensors", {"format": "pt"})
    write_shards(tmp_path / "tuned1", tuned[1], 3)
    return base, tuned, [tmp_path / "tuned0", tmp_path / "tuned1"]


@pytest.mark.parametrize("limits", [{}, {"max_memory": "8MiB", "workers": 1}], ids=["", "little memory"])
def test_dtypes_shards_and_missing_tensors(models, tmp_path, limits):
    """Differences are of the values as stored, in float64; the output is rounded once to the base's dtype."""
    base, tuned, paths = models
    options = {"method": "linear", "weight": [0.5, 0.25], **limits}
    report = dora_convert.merge(base.path, paths, tmp_path / "out", **options)
    assert any("tuned1" in text and GONE in text for text in report.warnings), report.warnings
    got = load(tmp_path / "out")
    assert got.keys() == base.tensors.keys()
    for name, stored in base.tensors.items():
        W = stored.double()
        want = W + sum(
            w * (each[name].double() - W) for w, each in zip((0.5, 0.25), tuned, strict=True) if name in each
        )
        assert got[name].dtype == torch.bfloat16
        torch.testing.assert_close(got[name].double(), want, rtol=2**-8, atol=0)
    assert dora_convert.verify(base.path, paths, tmp_path / "out").verdict == "agree"


def test_ties_of_full_models_is_the_same_with_any_memory(models, tmp_path):
    base, _, paths = models
    options = {"method": "ties", "density": 0.3}
    dora_convert.merge(base.path, paths, tmp_path / "one", **options)
    dora_convert.merge(base.path, paths, tmp_path / "two", max_memory="8MiB", workers=3, **options)
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert all(torch.equal(one[name], x) for name, x in two.items())
