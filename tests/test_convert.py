"""Adapters in other tools' formats: read back they change the same weights alike, and what does not go is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import dora_convert
from dora_convert.errors import UnsupportedError, UsageError

from .test_formats import CASES, GOLDEN, adapter_of, options_of, tensors_of

LANGUAGE = ("mlx-dora", "torchtune-dora-native", "loralib-linear")
PIPELINE = ("kohya-lora-sd15", "diffusers-dora")


def merged(case, adapter, out, **options):
    """The tensors of a case's base with an adapter."""
    dora_convert.merge(GOLDEN / CASES[case]["base"], adapter, out, undo="none", **options)
    return tensors_of(out)


@pytest.mark.parametrize(
    ("case", "to"),
    [(case, to) for case in LANGUAGE for to in ("peft", "kohya", "mlx", "torchtune")]
    + [("mlx-lora", "gguf"), ("loralib-linear", "gguf")]
    + [(case, to) for case in PIPELINE for to in ("diffusers", "kohya")],
)
def test_read_of_write_is_the_same(tmp_path, case, to):
    """Within one rounding of a folded scaling, else exactly; the report says which."""
    base, options = GOLDEN / CASES[case]["base"], options_of(case)
    report = dora_convert.convert(adapter_of(case), tmp_path / "new", to=to, base=base, **options).to_dict()
    assert (report["to"], report["format"], bool(report["modules"])) == (to, to, True)
    one = merged(case, adapter_of(case), tmp_path / "one", **options)
    two = merged(case, tmp_path / "new", tmp_path / "two")
    bound = 3e-7 if report["folded"] else 0
    assert all((one[name] - two[name]).norm() <= bound * one[name].norm() for name in one)


def test_one_alpha_folds_the_scalings(tmp_path):
    """mlx-lm has one scale: modules of several get theirs in lora_b, and smaller ranks zeros."""
    peft = tmp_path / "peft"
    dora_convert.convert(adapter_of("mlx-lora"), peft, to="peft")
    config = json.loads((peft / "adapter_config.json").read_text())
    rank = config["r"]
    config["alpha_pattern"] = {"q_proj": 3 * rank}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    assert dora_convert.convert(peft, tmp_path / "mlx", to="mlx").to_dict()["folded"] is True
    before = load_file(peft / "adapter_model.safetensors")
    after = load_file(tmp_path / "mlx/adapters.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    B = before[f"base_model.model.{name}.lora_B.weight"]
    assert torch.allclose(after[f"{name}.lora_b"], 3 * B.T, rtol=1e-6)


@pytest.mark.parametrize(
    ("case", "to", "words"),
    [
        ("lycoris-locon-dora-col", "kohya", "by columns"),
        ("lycoris-loha", "mlx", "LoHa"),
        ("peft-oft", "diffusers", "OFT"),
        ("kohya-lora-sd15", "peft", "pipeline"),
    ],
)
def test_what_does_not_go_is_named(tmp_path, case, to, words):
    """Every change that the format cannot hold, and the verb that helps; nothing is written."""
    with pytest.raises(UnsupportedError) as caught:
        dora_convert.convert(adapter_of(case), tmp_path / "new", to=to, base=GOLDEN / CASES[case]["base"])
    assert words in caught.value.text()
    assert "to-lora" in f"{caught.value.hint}" or "diffusers" in f"{caught.value.hint}"
    assert not any(tmp_path.iterdir())
    with pytest.raises(UnsupportedError):
        dora_convert.convert(adapter_of(case), tmp_path / "new", to=to, base=GOLDEN / CASES[case]["base"], dry_run=True)


def test_one_format_is_named(tmp_path):
    """Neither none nor two; --format alone is --to. A dry run lists the modules."""
    one, out = adapter_of("mlx-lora"), tmp_path / "new"
    with pytest.raises(UsageError, match="needs"):
        dora_convert.convert(one, out)
    with pytest.raises(UsageError, match="two formats"):
        dora_convert.convert(one, out, to="mlx", format="kohya")
    dry = dora_convert.convert(one, out, format="kohya", dry_run=True).to_dict()
    assert (dry["plan"]["to"], out.exists()) == ("kohya", False)
    made = dora_convert.convert(one, out, to="kohya").to_dict()
    assert dry["plan"]["modules"] == [module["name"] for module in made["modules"]]


def test_gguf_as_the_library_reads_it(tmp_path):
    """gguf's reader finds the pairs, and the factors by llama.cpp's names; rows of q in Meta's order."""
    import gguf

    base = GOLDEN / CASES["mlx-lora"]["base"]
    dora_convert.convert(adapter_of("mlx-lora"), tmp_path / "new", to="gguf", base=base)
    reader = gguf.GGUFReader(tmp_path / "new/adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.lora.alpha"].contents() == 20
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    own = load_file(adapter_of("mlx-lora") / "adapters.safetensors")
    q = own["model.layers.0.self_attn.q_proj.lora_b"].T  # four heads of eight rows
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_b"], q.view(4, 2, 4, -1).transpose(1, 2).reshape(q.shape))
    down = own["model.layers.0.mlp.down_proj.lora_a"].T
    assert torch.equal(tensors["blk.0.ffn_down.weight.lora_a"], down)


def test_a_base_is_asked_for(tmp_path):
    """Flattened names are read with a base only."""
    with pytest.raises(UsageError, match="base"):
        dora_convert.convert(adapter_of("lycoris-locon-dora-row"), tmp_path / "new", to="peft")
