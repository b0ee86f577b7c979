"""inspect of what is on the Hub: headers alone are asked for, and nothing of the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dora_convert

from .hubserver import COMMIT, Hub
from .hubserver import run as run_command
from .test_inspect import EMBEDDING, HEAD
from .toy import HIDDEN, edit_json, make_adapter, make_base, write_json, write_shards

# --- the Hub ----------------------------------------------------------------------------------------------------------

MOST = 8192
"""Bytes that are asked for of a weight file without an index; of others, what the index lets expect."""


@pytest.fixture
def hub(tmp_path):
    """A Hub with a base in shards that are larger than their headers, its merged copy, and adapters."""
    root = tmp_path / "hub"
    root.mkdir()
    base = make_base(root / "base", shards=1)
    (base.path / "model.safetensors").unlink()
    base.tensors[EMBEDDING] = torch.ones(4000, HIDDEN, dtype=torch.bfloat16)
    base.tensors[HEAD] = torch.ones(4000, HIDDEN, dtype=torch.bfloat16)
    write_shards(base.path, base.tensors, 2)
    (base.path / "pytorch_model.bin").write_bytes(b"x" * 300_000)
    adapter = make_adapter(root / "adapter", base, dora=True, base_model_name_or_path="org/base")
    (adapter / "model.safetensors").write_bytes(b"x" * 300_000)
    (root / "many").mkdir()
    make_adapter(root / "many" / "style", base, dora=False)
    single = make_base(root / "single", shards=1)
    save_file({EMBEDDING: torch.ones(8000, HIDDEN)}, single.path / "model.safetensors")
    (single.path / "config.json").unlink()
    old = root / "old"
    old.mkdir()
    torch.save(base.tensors, old / "pytorch_model.bin")
    write_json(old / "config.json", {"model_type": "llama"})
    repos = {"org/base": base.path, "me/adapter": adapter, "me/many": root / "many", "org/old": old,
             "org/single": single.path}  # fmt: skip
    server = Hub(repos, root)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def remote(hub, tmp_path):
    """Run `dora-convert` in a process of its own, which reads its environment once; (exit code, stdout, stderr)."""

    def call(*words, **environment):
        done = run_command(hub, tmp_path / "cache", *words, **{"HF_TOKEN": "", **environment})
        return done.returncode, done.stdout, done.stderr

    return call


def weights_sent(hub):
    """Bytes that were sent of every weight file."""
    found = {}
    for name, size in hub.sent:
        if name.endswith((".safetensors", ".bin")):
            found[name] = found.get(name, 0) + size
    return found


def test_remote_checkpoint(hub, remote, tmp_path):
    """A checkpoint on the Hub: the same report as of its folder, from the head of each shard."""
    code, out, err = remote("inspect", "org/base", "--json")
    assert code == 0, err
    sent = weights_sent(hub)
    assert sent.keys() == {f"org/base/model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert max(sent.values()) < 2000
    assert len(hub.sent) == 4  # config, index, and each header at once
    assert not any(path.suffix == ".safetensors" for path in (tmp_path / "cache").rglob("*"))
    far, near = json.loads(out), json.loads(remote("inspect", hub.repos["org/base"], "--json")[1])
    assert (far["repo"], far["commit"]) == ("org/base", COMMIT["main"])
    assert far["ref"] == far["title"] == f"org/base@{COMMIT['main']}"
    differ = {name for name in near if near[name] != far[name]} - {"seconds"}
    assert differ == {"title", "ref", "repo", "commit"}


def test_remote_single_file(hub, remote, tmp_path):
    """Without a config and an index: the one weight file's head, and no more of it."""
    code, out, err = remote("inspect", "org/single@v2", "--json")
    assert code == 0, err
    assert json.loads(out)["parameters"] == 8000 * HIDDEN
    assert weights_sent(hub) == {"org/single/model.safetensors": MOST}


def test_remote_long_header(hub, remote):
    """A header of more than 100 kB comes by a second request, of its length."""
    path = hub.repos["org/single"] / "model.safetensors"
    save_file({f"model.layers.{n}.weight": torch.ones(400) for n in range(2000)}, path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    code, out, err = remote("inspect", "org/single", "--json")
    assert code == 0, err
    assert json.loads(out)["tensors"] == 2000
    assert weights_sent(hub) == {"org/single/model.safetensors": 8 + length}


def test_remote_merge(hub, remote, tmp_path):
    """The receipt of a merged model on the Hub."""
    dora_convert.merge(hub.repos["org/base"], hub.repos["me/adapter"], tmp_path / "merged")
    hub.repos["org/merged"] = tmp_path / "merged"
    code, out, err = remote("inspect", "org/merged", "--json")
    assert code == 0, err
    assert [found["kind"] for found in json.loads(out)["merges"][0]["adapters"]] == ["DoRA"]


def test_remote_adapter_and_base(hub, remote, tmp_path):
    """An adapter is small and comes whole, but for a model beside it; of its base there come headers."""
    code, out, err = remote("inspect", "me/adapter", "--base", "org/base@v2", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["notes"] == ["holds a model's weights, too: model.safetensors"]
    assert report["landing"]["fits"]
    assert report["landing"]["base"] == f"org/base@{COMMIT['v2']}"
    sent = weights_sent(hub)
    assert sent.keys() == {
        "me/adapter/adapter_model.safetensors",
        *(f"org/base/model-0000{n}-of-00002.safetensors" for n in (1, 2)),
    }
    assert all(size < 2000 for name, size in sent.items() if name.startswith("org/base"))
    local = dora_convert.inspect(hub.repos["me/adapter"], hub.repos["org/base"]).to_dict()
    assert report["landing"]["ledger"] == json.loads(json.dumps(local["landing"]["ledger"]))


def test_remote_subfolders(hub, remote):
    """A repo of adapters lists them; one of them is named with its folder."""
    code, _, err = remote("inspect", "me/many")
    assert code == 2
    assert "these folders inside it do: style" in err
    assert "Hint: name one of them, such as hf://me/many/style" in err
    assert weights_sent(hub) == {}
    code, out, err = remote("inspect", "hf://me/many/style", "-q")
    assert (code, out) == (0, f"adapter hf://me/many@{COMMIT['main']}/style\n"), err


def test_remote_pickles(hub, remote, tmp_path):
    """Torch's pickles are not read from afar; a copy in the cache is."""
    code, _, err = remote("inspect", "org/old")
    assert code == 2
    assert "Hint: hf download org/old" in err
    assert weights_sent(hub) == {}
    assert remote("merge", "org/old", "me/adapter", tmp_path / "out")[0] == 0
    code, out, err = remote("inspect", "org/old", "--json")
    assert code == 0, err
    assert json.loads(out)["format"] == "torch pickle"


def test_offline(hub, remote, tmp_path):
    """Without a connection, the cached copy counts; where there is none, that is said."""
    assert remote("merge", "org/base", "me/adapter", tmp_path / "out")[0] == 0
    for ref in ("org/base", "me/adapter"):
        code, out, err = remote("inspect", ref, "-q", HF_HUB_OFFLINE="1")
        assert (code, out.split()[1]) == (0, f"{ref}@{COMMIT['main']}"), err
    code, _, err = remote("inspect", "org/single", HF_HUB_OFFLINE="1")
    assert code == 2
    assert "HF_HUB_OFFLINE" in err


def test_remote_damage(hub, remote):
    """Missing repos and shards, indexes that are wrong, headers that are none: exit code 2 and a message."""
    assert "neither a local path nor a repo" in remote("inspect", "org/none")[2]
    shard = hub.repos["org/base"] / "model-00002-of-00002.safetensors"
    data, index = shard.read_bytes(), hub.repos["org/base"] / "model.safetensors.index.json"
    for damage in (
        b"",
        b"\xff" * 300,
        (100).to_bytes(8, "little") + b"[" * 100,
        (2).to_bytes(8, "little") + b"[]",
        data.replace(b'"BF16"', b'"BF17"'),
        data.replace(b'"shape":[', b'"shape":[7,'),
        data.replace(b'"shape":[', b'"shape":["'),
    ):
        shard.write_bytes(damage)
        code, _, err = remote("inspect", "org/base")
        assert code == 2
        assert "the header of model-00002-of-00002.safetensors is damaged" in err
    shard.unlink()
    assert "names 1 files that do not exist" in remote("inspect", "org/base")[2]
    shard.write_bytes(data)
    table = json.loads(index.read_text())["weight_map"] | {"model.more.weight": shard.name}
    edit_json(index, weight_map=table)
    (Path(index.parent) / "README.md").write_text("another commit")
    code, _, err = remote("inspect", "org/base@v2")
    assert code == 2
    assert "is wrong about 1 tensors" in err


def test_remote_token(hub, remote):
    """--token goes to the Hub, with range requests, too, and nowhere else."""
    code, out, err = remote("inspect", "org/base", "--token", "hf_secret", "-v")
    assert code == 0
    assert "hf_secret" not in out + err
    assert {token for _, path, token in hub.requests if "/base" in path} == {"Bearer hf_secret"}


def test_trained_weights_beside_a_remote_adapter(hub, remote, tmp_path):
    """They are downloaded with the adapter and applied; a model beside them, by its name, is not, and that is said."""
    norm = "model.layers.0.input_layernorm.weight"
    torch.save({norm: torch.full((HIDDEN,), 7.0).bfloat16()}, hub.repos["me/adapter"] / "non_lora_state_dict.bin")
    code, out, err = remote("inspect", "me/adapter", "--json")
    assert code == 0, err
    assert "weights beside the adapter: non_lora_state_dict.bin, 1 tensors" in json.loads(out)["notes"]
    code, out, err = remote("merge", "org/base", "me/adapter", tmp_path / "out", "--json")
    assert code == 0, err
    entries = [entry for entry in json.loads(out)["ledger"] if "non_lora_state_dict.bin" in entry["why"]]
    assert [(entry["tensor"], entry["fate"]) for entry in entries] == [(norm, "replaced")]
    assert "model.safetensors" in err
    assert "me/adapter/model.safetensors" not in weights_sent(hub)
