"""Adapters in other tools' formats: read back they change the same weights alike, and what does not go is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import UnsupportedError, UsageError
from dora_convert.formats.gguf import names

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


@pytest.mark.parametrize("architecture", sorted({*names.ARCHITECTURES.values()}))
def test_names_are_those_of_the_gguf_library(architecture):
    """Every name that we give a module, for each architecture; names of other architectures' modules aside."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], 2)
    own = names.OTHERS.get(architecture, {})
    given = {f"model.layers.1.{hub}": f"blk.1.{name}" for hub, name in names.modules_of(architecture).items()}
    found = {hub: table.get_name(hub) for hub in given}
    assert {hub: name for hub, name in found.items() if name and name != given[hub]} == {}
    assert all(found[f"model.layers.1.{hub}"] for hub in own)
    assert {table.get_name(hub) for hub in names.OUTSIDE} - {None} <= set(names.OUTSIDE.values())


def test_gguf_of_another_architecture(tmp_path):
    """Phi-3's fused projections and an embedding: read back they change the same weights."""
    modules = {"model.layers.0.self_attn.qkv_proj": (24, 8), "model.layers.0.mlp.gate_up_proj": (32, 8)}
    base = {f"{name}.weight": torch.randn(shape) for name, shape in modules.items()}
    base["model.embed_tokens.weight"] = torch.randn(12, 8)
    write_model(tmp_path / "base", base, {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]})
    tensors = {}
    for name, (rows, columns) in modules.items():
        tensors |= {f"{name}.lora_A.weight": torch.randn(2, columns), f"{name}.lora_B.weight": torch.randn(rows, 2)}
    tensors["model.embed_tokens.lora_embedding_A"] = torch.randn(2, 12)
    tensors["model.embed_tokens.lora_embedding_B"] = torch.randn(8, 2)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["qkv_proj", "gate_up_proj", "embed_tokens"],
    }
    write_adapter(tmp_path / "peft", tensors, config)
    dora_convert.convert(tmp_path / "peft", tmp_path / "own", to="gguf", base=tmp_path / "base")
    for name in ("peft", "own"):
        dora_convert.merge(tmp_path / "base", tmp_path / name, tmp_path / f"out-{name}")
    one, two = (tensors_of(tmp_path / f"out-{name}") for name in ("peft", "own"))
    assert all(torch.equal(one[name], two[name]) and not torch.equal(one[name], W) for name, W in base.items())


def write_model(folder, tensors, config):
    """Write a checkpoint of one file."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder, tensors, config):
    """Write a PEFT adapter."""
    folder.mkdir()
    own = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(own, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_a_base_is_asked_for(tmp_path):
    """Flattened names are read with a base only."""
    with pytest.raises(UsageError, match="base"):
        dora_convert.convert(adapter_of("lycoris-locon-dora-row"), tmp_path / "new", to="peft")
