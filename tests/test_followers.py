"""A bias that follows the norm of its weight, where the two lie in other shards: read from the Hub without the cache."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert

from .hubserver import Hub, run
from .test_other_kinds import base_of, distance

MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj")


def split(tensors, path, *, biases_first):
    """Write a checkpoint of nine shards; biases have the first or the last of them."""
    biases = [name for name in tensors if name.endswith("bias")]
    others = [name for name in tensors if name not in biases]
    groups = [others[k::8] for k in range(8)]
    groups = [biases, *groups] if biases_first else [*groups, biases]
    files = {f"model-0000{k + 1}-of-00009.safetensors": names for k, names in enumerate(groups)}
    path.mkdir()
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, path / file, {"format": "pt"})
    table = {name: file for file, names in files.items() for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (path / "config.json").write_bytes((base_of("peft-ia3") / "config.json").read_bytes())


def read(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(params=[True, False], ids=["biases first", "biases last"])
def made(request, tmp_path):
    """A base in shards and an adapter of fsdp_qlora, whose forward scales the bias by m/‖V‖, too; the right result."""
    W = load_file(base_of("peft-ia3") / "model.safetensors")
    split(W, tmp_path / "base", biases_first=request.param)
    torch.manual_seed(0)
    tensors, wanted = {}, dict(W)
    for name in MODULES:
        weight = W[f"{name}.weight"]
        A, B, m = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4), 1 + torch.rand(weight.shape[0])
        tensors |= {f"{name}.dora_layer.lora_A.weight": A, f"{name}.dora_layer.lora_B.weight": B}
        tensors[f"{name}.magnitude_layer.magnitude"] = m
        V = weight.double() + B.double() @ A.double()
        f = m / V.norm(dim=1)
        wanted |= {f"{name}.weight": f[:, None] * V, f"{name}.bias": f * W[f"{name}.bias"]}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter/model_state_dict.safetensors")
    return tmp_path, W, wanted


def test_the_weights_of_biases_are_here_when_they_are_needed(made):
    """Merged, verified and taken out with few files on the disk, none of which stays."""
    root, W, wanted = made
    hub = Hub({"org/base": root / "base", "me/dora": root / "adapter"}, root)
    most = 0

    def look(name):
        nonlocal most
        most = max(most, len(list((root / "home").rglob("model-0*-of-*.safetensors"))))

    hub.on_read = look
    stream = ("--no-cache", "--workers", "1")
    try:
        done = run(hub, root / "home", "merge", "org/base", "me/dora", root / "out", "--undo", "none", *stream)
        assert done.returncode == 0, done.stderr
        assert distance(read(root / "out"), wanted) < 1e-6
        done = run(hub, root / "home", "verify", "org/base", "me/dora", root / "out", *stream)
        assert done.returncode == 0, done.stdout
        words = ("unmerge", root / "out", "me/dora", root / "back", "--base", "org/base", *stream)
        done = run(hub, root / "home", *words)
        assert done.returncode == 0, done.stderr
        assert distance(read(root / "back"), W) < 1e-5
    finally:
        hub.shutdown()
        hub.server_close()
    assert most <= 5
    assert [path for path in (root / "home").rglob("*.safetensors") if path.is_file()] == []


def test_the_same_from_folders_and_back_bit_for_bit(made):
    root, W, wanted = made
    dora_convert.merge(root / "base", root / "adapter", root / "near", undo="exact")
    assert distance(read(root / "near"), wanted) < 1e-6
    dora_convert.unmerge(root / "near", root / "adapter", root / "back")
    assert all(torch.equal(tensor, W[name]) for name, tensor in read(root / "back").items())
