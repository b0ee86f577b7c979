"""For any shapes, ranks, scalings and dtypes: merged is the rounded definition, or the adapter is refused."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import DoraConvertError
from dora_convert.storage import reader as blocks

from .toy import rounded

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODULES = ["a.q_proj", "a.b.q_proj", "c.up"]
KEYS = ["q_proj", "b.q_proj", "a.*", "up", "c", ".*proj"]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks even here."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 8)


@st.composite
def cases(draw):
    """A base, and an adapter's config whose ranks the tensors keep to."""
    sizes = st.integers(1, 40)
    ranks = st.integers(1, 6)
    config = {
        "peft_type": "LORA",
        "r": draw(ranks),
        "lora_alpha": draw(st.integers(1, 40)),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(KEYS), ranks, max_size=3)),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(KEYS), st.integers(1, 9), max_size=3)),
    }
    shapes = {module: (draw(sizes), draw(sizes)) for module in MODULES}
    return config, shapes, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31))


def of(config, name, module):
    """PEFT's rule, written anew: the first key that matches the whole name or the end of it after a dot."""
    for key, value in config[f"{name}_pattern"].items():
        if re.search(rf"(^|\.)({key})$", module):
            return value
    return config["r" if name == "rank" else "lora_alpha"]


def written(root, config, shapes, dtype, seed):
    """The files of a case, and what must come out."""
    torch.manual_seed(seed)
    base, adapter, want = {}, {}, {}
    for module, (out, inputs) in shapes.items():
        rank, prefix = of(config, "rank", module), f"base_model.model.{module}"
        W = torch.randn(out, inputs).to(dtype)
        A, B = torch.randn(rank, inputs), torch.randn(out, rank) * 0.1
        adapter |= {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
        s = of(config, "alpha", module) / (math.sqrt(rank) if config["use_rslora"] else rank)
        V = W.double() + s * B.double() @ A.double()
        if config["use_dora"]:
            m = adapter[f"{prefix}.lora_magnitude_vector"] = W.float().norm(dim=1) * (torch.rand(out) + 0.5)
            V = V * (m.double() / V.norm(dim=1))[:, None]
        base[f"{module}.weight"], want[f"{module}.weight"] = W, V
    for name in ("base", "adapter"):
        (root / name).mkdir()
    save_file(base, root / "base/model.safetensors")
    save_file(adapter, root / "adapter/adapter_model.safetensors")
    (root / "adapter/adapter_config.json").write_text(json.dumps(config))
    return want


@quick
@given(case=cases())
def test_merged_is_the_definition(tmp_path_factory, case):
    """Whatever the shapes: at most ties of float64 sums may fall the other way."""
    root = tmp_path_factory.mktemp("case")
    want = written(root, *case)
    report = dora_convert.merge(root / "base", root / "adapter", root / "out")
    assert report.verified.wrong_elements == 0
    merged = load_file(root / "out/model.safetensors")
    for name, x in want.items():
        step = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-23}[case[2]]
        got, exact = merged[name], rounded(x, case[2])
        off = got != exact
        assert off.sum() <= (1 + got.numel() // 100 if case[2] == torch.float32 else 0)
        assert ((got - exact).abs() <= step * exact.abs()).all()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias",
    "layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora", "kasa_config", "peft_version",
    "init_lora_weights", "auto_mapping", "task_type", "target_modules", "ensure_weight_tying", "revision", "exclude_modules",
    "layers_to_transform", "layers_pattern", "unheard_of",
]  # fmt: skip


@quick
@given(case=cases(), fields=st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=3))
def test_any_config_merges_or_is_refused(tmp_path_factory, case, fields):
    """No value of any field is a crash, and whatever is refused leaves nothing."""
    root = tmp_path_factory.mktemp("config")
    written(root, *case)
    (root / "adapter/adapter_config.json").write_text(json.dumps(case[0] | fields))
    try:
        dora_convert.merge(root / "base", root / "adapter", root / "out")
    except DoraConvertError:
        assert sorted(path.name for path in root.iterdir()) == ["adapter", "base"]


@quick
@given(case=cases(), data=st.data())
def test_any_lost_or_reshaped_tensor_is_an_error(tmp_path_factory, case, data):
    """Half a pair, a magnitude gone, or another shape never merges as something else."""
    root = tmp_path_factory.mktemp("tensor")
    written(root, *case)
    path = root / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    if data.draw(st.booleans()):
        del tensors[name]
    else:
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    save_file(tensors, path)
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(root / "base", root / "adapter", root / "out")
    assert name.removesuffix(".weight").rpartition(".")[0].removeprefix("base_model.model.") in caught.value.text()
    assert not (root / "out").exists()
