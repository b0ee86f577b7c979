"""Models that are not what their adapter's names say at first: experts, attention in one matrix, layers written out, heads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import DoraConvertError, PlanError, UsageError, VerificationError
from dora_convert.output.shards import ShardFiles

from .test_kinds import (
    D1,
    D2,
    RANK,
    E,
    tied,  # noqa: F401 - fixtures
)
from .toy import edit_json, load, make_adapter, make_base, rounded, write_shards


@pytest.fixture
def experts(tmp_path):
    """A base with experts in one tensor, and an adapter on them."""
    base = make_base(tmp_path / "moe")
    weight = torch.randn(E, D1, D2).bfloat16()
    base.tensors["model.layers.0.mlp.experts.down_proj"] = weight
    write_shards(base.path, base.tensors, 2)
    extra = {
        "base_model.model.model.layers.0.mlp.experts.lora_A.weight": torch.randn(E * RANK, D2),
        "base_model.model.model.layers.0.mlp.experts.lora_B.weight": torch.randn(D1, RANK * E),
    }
    config = {"target_parameters": ["experts.down_proj"], "peft_version": "0.21.2"}
    adapter = make_adapter(tmp_path / "experts", base, dora=False, targets=("k_proj",), extra=extra, **config)
    return base, adapter, weight, extra


def test_experts(tmp_path, experts, monkeypatch):
    """A lies expert after expert, B with the expert varying fastest; no block holds rows of two."""
    from dora_convert.storage import reader as blocks

    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 7)
    base, adapter, weight, extra = experts
    A, B = (tensor.double() for tensor in extra.values())
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert report.verified.wrong_elements == 0
    merged = load(tmp_path / "out")["model.layers.0.mlp.experts.down_proj"]
    for e in range(E):
        delta = 1.5 * B[:, e::E] @ A[e * RANK : (e + 1) * RANK]
        assert torch.equal(merged[e], rounded(weight[e] + delta, torch.bfloat16)), e


def test_experts_are_verified(tmp_path, experts):
    """A fault in one expert is found, with its cause."""
    base, adapter, weight, _ = experts
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert dora_convert.verify(base.path, adapter, tmp_path / "out").verdict == "agree"
    name = "model.layers.0.mlp.experts.down_proj"
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][1] = weight[1]
            save_file(tensors, path)
    report = dora_convert.verify(base.path, adapter, tmp_path / "out")
    assert report.verdict == "differ"
    assert "not merged" in report.problems[0]


def wrong_byte(monkeypatch, tensor):
    """A disk that changes one element of a tensor."""
    write = ShardFiles.write

    def writes(self, item, offset, data):
        if item.name == tensor and offset == 0:
            data = memoryview(bytearray(data))
            data[1] ^= 0x40
        write(self, item, offset, data)

    monkeypatch.setattr(ShardFiles, "write", writes)


def test_the_self_check_sees_experts(tmp_path, experts, monkeypatch):
    """One wrong element is found."""
    base, adapter, *_ = experts
    wrong_byte(monkeypatch, "model.layers.0.mlp.experts.down_proj")
    with pytest.raises(VerificationError):
        dora_convert.merge(base.path, adapter, tmp_path / "out")


@pytest.mark.parametrize("start", ["pissa", "olora", "kasa"])
def test_the_self_check_sees_starts(tmp_path, base, monkeypatch, start):
    """Also where the base was changed before training."""
    adapter = make_adapter(tmp_path / "started", base, dora=False, targets=("mlp.down_proj",))
    if start == "kasa":
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        diagonal = {name.replace("lora_A.weight", "lora_diag"): torch.randn(4) for name in tensors if "lora_A" in name}
        save_file(tensors | diagonal, path)
        edit_json(adapter / "adapter_config.json", kasa_config={"beta": 1})
    else:
        edit_json(adapter / "adapter_config.json", init_lora_weights=start)
    assert dora_convert.merge(base.path, adapter, tmp_path / "good").verified.wrong_elements == 0
    wrong_byte(monkeypatch, "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(VerificationError):
        dora_convert.merge(base.path, adapter, tmp_path / "out")


def test_starts_need_the_whole_matrix(tmp_path, base):
    """More than the budget holds is refused, with the least that would do."""
    adapter = make_adapter(tmp_path / "a", base, dora=False, init_lora_weights="pissa")
    plain = dora_convert.merge(base.path, make_adapter(tmp_path / "b", base, dora=False), tmp_path / "x", dry_run=True)
    least = dora_convert.merge(base.path, adapter, tmp_path / "x", dry_run=True).plan["least_memory"]
    assert least > plain.plan["least_memory"]
    with pytest.raises(UsageError, match="does not hold"):
        dora_convert.merge(base.path, adapter, tmp_path / "x", max_memory=least - 1)


def test_a_start_has_no_strength(tmp_path, base):
    """Half of PiSSA is nothing anybody trained; nor is it with another adapter on the same weight."""
    adapter = make_adapter(tmp_path / "a", base, dora=False, init_lora_weights="pissa")
    other = make_adapter(tmp_path / "b", base, dora=False)
    for adapters, weight in (([adapter], [0.5]), ([adapter, other], [])):
        with pytest.raises(PlanError) as caught:
            dora_convert.merge(base.path, adapters, tmp_path / "out", weight=weight)
        assert "merged alone and at weight 1" in caught.value.text()


def attention(tmp_path, base, version):
    """MultiheadAttention, adapted by some version of PEFT."""
    torch.manual_seed(5)
    base.tensors |= {
        "attn.in_proj_weight": torch.randn(36, 12).bfloat16(),
        "attn.out_proj.weight": torch.randn(12, 12).bfloat16(),
    }
    write_shards(base.path, base.tensors, 2)
    prefix = "base_model.model.attn"
    extra = {
        f"{prefix}.lora_A.weight": torch.randn(4, 12),
        f"{prefix}.lora_B.weight": torch.randn(36, 4),
        f"{prefix}.base_layer.out_proj.lora_A.weight": torch.randn(4, 12),
        f"{prefix}.base_layer.out_proj.lora_B.weight": torch.randn(12, 4),
    }
    config = {"peft_version": version} if version else {}
    path = make_adapter(tmp_path / "mha", base, dora=False, targets=("none",), extra=extra, **config)
    return path, [tensor.double() for tensor in extra.values()]


@pytest.mark.parametrize(("version", "times"), [(None, 2), ("0.15.1", 2), ("0.21.2", 2), ("0.22.0", 1)])
def test_multihead_attention_by_version(tmp_path, base, version, times):
    """PEFT added the output projection twice until it was mended: what was trained counts."""
    adapter, (A, B, A_out, B_out) = attention(tmp_path, base, version)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    merged = load(tmp_path / "out")
    want = base.tensors["attn.in_proj_weight"] + 1.5 * B @ A
    assert torch.equal(merged["attn.in_proj_weight"], rounded(want, torch.bfloat16))
    want = base.tensors["attn.out_proj.weight"] + times * 1.5 * B_out @ A_out
    assert torch.equal(merged["attn.out_proj.weight"], rounded(want, torch.bfloat16))


def test_ignored_fields(tmp_path, base, adapter):
    """A field that the user has looked at stops nothing; others still do."""
    edit_json(adapter / "adapter_config.json", use_quantum=True, use_magic={"a": 1})
    for fields in ((), ("use_quantum",)):
        with pytest.raises(DoraConvertError, match="does not merge"):
            dora_convert.merge(base.path, adapter, tmp_path / "out", ignore_field=fields)
    dora_convert.merge(base.path, adapter, tmp_path / "out", ignore_field=("use_quantum", "use_magic"))


def test_a_merge_that_changes_nothing_is_said_so(tmp_path, base):
    """An untrained adapter, or one that rounding swallows."""
    adapter = make_adapter(tmp_path / "a", base, dora=False)
    path = adapter / "adapter_model.safetensors"
    save_file({k: v * ("lora_A" in k) for k, v in load_file(path).items()}, path)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "changes nothing" in report.warnings[0]
