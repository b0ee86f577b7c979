"""Every kind of quantised tensor decodes to the float64 values that the tools which made it mean."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from dora_convert.codecs.detect import find_coded, with_dense

from .quantised_bases import GOLDEN, TRUTH, decoded
from .quantised_bases import opened as open_folder


def opened(kind):
    return open_folder(GOLDEN / kind)


def in_blocks(tensor, height):
    """Decode a tensor in blocks of some rows, as one matrix."""
    rows = tensor.numel // tensor.columns
    return torch.cat([decoded(tensor, start, min(start + height, rows)) for start in range(0, rows, height)])


@pytest.mark.parametrize("kind", sorted(TRUTH))
def test_values_are_exact(kind):
    """Whole tensors and blocks of odd heights decode to the tool's values, every bit of the float64."""
    coded = find_coded(opened(kind))
    assert sorted(coded) == sorted(TRUTH[kind])
    for name, truth in TRUTH[kind].items():
        tensor = coded[name]
        assert list(tensor.shape) == truth["shape"]
        whole = in_blocks(tensor, 1 << 20)
        assert whole.flatten()[:4].tolist() == pytest.approx(truth["first"], rel=1e-12)
        assert hashlib.sha256(whole.numpy().tobytes()).hexdigest() == truth["sha256"], name
        assert torch.equal(in_blocks(tensor, 7), whole)


@pytest.mark.parametrize("kind", ["fp8-blocks", "gptq", "mlx-4", "bnb-nf4", "ct-int4"])
def test_a_base_is_shown_dense(kind):
    """The dense view has every weight of the model once, in the config's dtype, and none of the parts."""
    base = opened(kind)
    dense = with_dense(base, find_coded(base))
    names = {f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert names < set(dense.tensors)
    assert len(dense.tensors) == 12
    wanted = "F16" if kind == "gptq" else "BF16"
    assert {tensor.dtype for tensor in dense.tensors.values()} == {wanted}
    assert dense.tensors["model.layers.0.mlp.down_proj.weight"].shape == (32, 64)


def test_the_dtype_of_dense_weights():
    """The caller's dtype comes first, then the config's, then the scales'."""
    base = opened("ct-int4")
    assert {tensor.dtype for tensor in find_coded(base, "F32").values()} == {"F32"}
    bare = replace(base, config={k: v for k, v in base.config.items() if k != "dtype"})
    assert {tensor.dtype for tensor in find_coded(bare).values()} == {"BF16"}


def test_dense_bases_have_no_coded_tensors(tmp_path):
    """Without the parts there is nothing to decode, whatever a config says."""
    base = opened("fp8-blocks")
    kept = tuple(tensor for tensor in base.shards[0].tensors if "proj" not in tensor.name)
    assert find_coded(replace(base, shards=(replace(base.shards[0], tensors=kept),))) == {}
