"""Hub repos as inputs, against a real HTTP server on loopback that a real huggingface_hub talks to."""

from __future__ import annotations

import json

import pytest
import torch

import dora_convert

from .hubserver import COMMIT, Hub, run
from .toy import contents, edit_json, make_adapter, make_base, write_shards


@pytest.fixture
def hub(tmp_path):
    """A Hub with a base, whose repo also has weights in other formats, and an adapter for it."""
    root = tmp_path / "hub"
    root.mkdir()
    base = make_base(root / "base")
    (base.path / "pytorch_model.bin").write_bytes(b"x" * 5000)
    (base.path / "original").mkdir()
    (base.path / "original/consolidated.00.pth").write_bytes(b"x" * 5000)
    adapter = make_adapter(root / "adapter", base, dora=True, base_model_name_or_path="org/base", revision="v2")
    (adapter / "optimizer.pt").write_bytes(b"x" * 5000)
    make_adapter(root / "many", base, dora=False).rename(root / "many-x")
    (root / "many").mkdir()
    (root / "many-x").rename(root / "many" / "style")
    server = Hub({"org/base": base.path, "me/adapter": adapter, "me/many": root / "many"}, root)
    yield server
    server.shutdown()
    server.server_close()


def merge(hub, tmp_path, *words, **environment):
    """A merge, with a cache of its own."""
    return run(hub, tmp_path / "cache", "merge", *words, **{"HF_TOKEN": "", **environment})


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    """The error names the variable that moves the cache, and the option that does without it."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/hub").write_bytes(b"")
    done = merge(hub, tmp_path, "org/base", "me/adapter", tmp_path / "out")
    assert done.returncode == 2
    assert "cannot be kept in" in done.stderr
    assert "HF_HOME names the cache's folder" in done.stderr
    assert not (tmp_path / "out").exists()
    done = merge(hub, tmp_path, "org/base", "me/adapter", tmp_path / "out", "--no-cache")
    assert done.returncode == 0, done.stderr


def test_repos_give_the_same_bytes_as_folders(hub, tmp_path):
    """Base and adapter from the Hub: same weights; the commit is pinned, reported and recorded; stale weights stay."""
    done = merge(hub, tmp_path, "org/base", "me/adapter", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["base"] == f"org/base@{COMMIT['main']}"
    assert report["adapters"] == [f"me/adapter@{COMMIT['main']}"]
    local = merge(hub, tmp_path, hub.repos["org/base"], hub.repos["me/adapter"], tmp_path / "local")
    assert local.returncode == 0, local.stderr
    remote, near = contents(tmp_path / "out"), contents(tmp_path / "local")
    for name in near.keys() - {"README.md", "dora_convert/receipt.json"}:
        assert remote[name] == near[name]
    receipt = json.loads(remote["dora_convert/receipt.json"])
    assert receipt["base"].items() >= {"name": "org/base", "repo": "org/base", "commit": COMMIT["main"]}.items()
    assert receipt["base"]["hash"] == json.loads(near["dora_convert/receipt.json"])["base"]["hash"]
    card = remote["README.md"].decode()
    assert "base_model: org/base\n" in card
    assert "base_model_relation: finetune" in card
    fetched = {path for command, path, _ in hub.requests if command == "GET"}
    assert not any(path.endswith((".bin", ".pth", ".pt")) for path in fetched)


def test_the_adapters_revision_of_its_base(hub, tmp_path):
    """Without BASE: the base that the adapter names, at the revision that it names."""
    done = merge(hub, tmp_path, "me/adapter", tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["base"] == f"org/base@{COMMIT['v2']}"
    assert f"base: org/base@{COMMIT['v2']}, as me/adapter says" in done.stderr


def test_revisions_and_subfolders(hub, tmp_path):
    """org/name@revision, and hf:// with a folder inside the repo."""
    done = merge(hub, tmp_path, "org/base@v2", "hf://me/many/style", tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["base"] == f"org/base@{COMMIT['v2']}"
    assert report["tensors"]["merged"] == 6


def test_from_the_cache_when_offline(hub, tmp_path):
    """Without the Hub, cached files are used; the error names files that are not cached."""
    assert merge(hub, tmp_path, "org/base", "me/adapter", tmp_path / "one").returncode == 0
    done = merge(hub, tmp_path, "org/base", "me/adapter", tmp_path / "two", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    done = merge(hub, tmp_path, "org/other", "me/adapter", tmp_path / "three", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "org/other is neither a local path nor in the cache, and HF_HUB_OFFLINE=1" in done.stderr


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("org/none", "neither a local path nor a repo"),
        ("org/base@v9", "revision v9 not found"),
        ("me/many", "has no safetensors weights"),
    ],
)
def test_refusals(hub, tmp_path, ref, message):
    """Missing repos and revisions, and repos without weights: exit code 2, in one message."""
    done = merge(hub, tmp_path, ref, "me/adapter", tmp_path / "out")
    assert done.returncode == 2
    assert message.replace("has no", "holds no") in done.stderr or message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_gated_repo(hub, tmp_path):
    """A gated repo: where to ask."""
    hub.gated.add("org/base")
    done = merge(hub, tmp_path, "org/base", "me/adapter", tmp_path / "out")
    assert done.returncode == 2
    assert "org/base is gated" in done.stderr


def test_unreachable_hub(hub, tmp_path):
    """No connection: said so, quickly."""
    done = merge(hub, tmp_path, "org/base", "me/adapter", tmp_path / "out", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "the Hub cannot be reached" in done.stderr


def test_token_is_used_and_never_shown(hub, tmp_path):
    """--token goes to the Hub and nowhere else."""
    done = merge(hub, tmp_path, "org/base", "me/adapter", tmp_path / "out", "--token", "hf_secret", "-v")
    assert done.returncode == 0, done.stderr
    assert {token for _, path, token in hub.requests if "/base" in path} == {"Bearer hf_secret"}
    assert "hf_secret" not in done.stdout + done.stderr
    assert not any(b"hf_secret" in data for data in contents(tmp_path / "out").values())


def test_base_named_differently(hub, tmp_path):
    """A repo other than the adapter's own base is a warning."""
    edit_json(hub.repos["me/adapter"] / "adapter_config.json", base_model_name_or_path="org/elsewhere")
    done = merge(hub, tmp_path, "org/base", "me/adapter", tmp_path / "out", "--dry-run")
    assert done.returncode == 0
    assert "warning: me/adapter was trained on org/elsewhere; BASE is org/base" in done.stderr


def test_a_dry_run_reads_headers_only(tmp_path):
    """Of a hundred shards: less than a megabyte for all of them, and no weights."""
    root = tmp_path / "hub"
    root.mkdir()
    base = make_base(root / "base", shards=1)
    (base.path / "model.safetensors").unlink()
    big = {f"model.layers.{n}.mlp.gate_proj.weight": torch.zeros(300, 400) for n in range(100)}
    write_shards(base.path, base.tensors | big, 100)
    (base.path / "tokenizer.json").write_bytes(b" " * 3_000_000)
    adapter = make_adapter(root / "adapter", base, dora=True)
    server = Hub({"org/base": base.path, "me/adapter": adapter}, root)
    done = merge(server, tmp_path, "org/base", "me/adapter", tmp_path / "out", "--dry-run", "--json")
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["shards"] == 100
    of_base = [(name, size) for name, size in server.sent if name.startswith("org/base")]
    assert len(of_base) == 102  # config, index, and one request a shard
    assert sum(size for _, size in of_base) < 100_000
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "verb",
    [("to-lora", "--rank", "2"), ("from-lora", "--include", "*up_proj"), ("extract", "--rank", "2", "--kind", "lora")],
    ids=lambda v: v[0],
)
def test_adapters_are_planned_from_headers(hub, tmp_path, verb):
    """Of adapters that are to be made: a dry run brings no weights of the base, the run itself does."""
    other = {"to-lora": "me/adapter", "from-lora": "hf://me/many/style", "extract": "me/tuned"}[verb[0]]
    if verb[0] == "extract":
        hub.repos["me/tuned"] = hub.repos["org/base"].parent / "tuned"
        dora_convert.merge(hub.repos["org/base"], hub.repos["me/adapter"], hub.repos["me/tuned"])
    words = (verb[0], "org/base", other, tmp_path / "out", *verb[1:])
    done = run(hub, tmp_path / "cache", *words, "--dry-run")
    assert done.returncode == 0, done.stderr
    size = (hub.repos["org/base"] / "model-00001-of-00002.safetensors").stat().st_size
    assert all(sent < size for name, sent in hub.sent if "model-0" in name)
    done = run(hub, tmp_path / "cache", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_without_the_cache(hub, tmp_path):
    """--no-cache: the same bytes, and nothing of what was downloaded stays on this machine."""
    near = merge(hub, tmp_path, hub.repos["org/base"], hub.repos["me/adapter"], tmp_path / "near")
    assert near.returncode == 0, near.stderr
    done = merge(hub, tmp_path, "org/base", "me/adapter", tmp_path / "far", "--no-cache")
    assert done.returncode == 0, done.stderr
    same_model(tmp_path / "far", tmp_path / "near")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not list((tmp_path / "far").rglob("incoming"))


def same_model(one, other):
    """Return True if two merges differ only in the names of the inputs in receipt and card."""
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys()
    for name in one.keys() - {"README.md", "dora_convert/receipt.json"}:
        assert one[name] == other[name], name
    first, second = (json.loads(each["dora_convert/receipt.json"]) for each in (one, other))
    assert first["tensors"] == second["tensors"]
    assert first["base"]["hash"] == second["base"]["hash"]


@pytest.mark.parametrize("words", [(), ("--no-cache",)])
def test_damaged_on_the_way(hub, tmp_path, words):
    """Other bytes than the Hub has the hash of: said so, removed, and fetched again by the same command."""
    hub.fail("GET /org/base/resolve/.*model-00002", skip=1, corrupt=True)  # not the header
    command = ("org/base", "me/adapter", tmp_path / "out", *words)
    done = merge(hub, tmp_path, *command)
    assert done.returncode == 2
    assert "model-00002-of-00002.safetensors of org/base arrived damaged" in done.stderr
    assert not (tmp_path / "out").exists()
    done = merge(hub, tmp_path, *command)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("pattern", "how", "message"),
    [
        ("/api/models/org/base", {"status": 401}, "the Hub does not know who you are"),
        ("/api/models/org/base", {"status": 403, "message": "blocked here"}, "blocked here"),
        ("/api/models/org/base", {"status": 503, "times": 99}, "the Hub has a failure (503)"),
        (
            "GET /org/base/resolve/.*model-00001",
            {"status": 404, "code": "EntryNotFound"},
            "file not found in the repo: model-00001",
        ),
        ("resolve/.*model-00001", {"status": 403, "times": 99, "skip": 1}, "does not let you read this repo"),
    ],
)
def test_refused_reading(hub, tmp_path, pattern, how, message):
    """A refusal of the Hub is one message with exit code 2, at any time."""
    hub.fail(pattern, **how)
    done = merge(hub, tmp_path, "org/base", "me/adapter", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        ("/api/models/org/base", {"status": 429}),
        ("GET /org/base/resolve/.*model-00001", {"status": 502}),
        ("GET /org/base/resolve/.*model-00001", {"cut": True, "skip": 1}),
        ("GET /me/adapter/resolve/.*safetensors", {"cut": True}),
    ],
)
def test_trouble_that_passes(hub, tmp_path, pattern, how):
    """Busy servers and broken connections are tried again; what was cut off is continued."""
    hub.fail(pattern, **how)
    done = merge(hub, tmp_path, "org/base", "me/adapter", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert any(fault.times == 0 for fault in hub.faults)


def test_verify(hub, tmp_path):
    """BASE, ADAPTER and MERGED on the Hub; where headers show that they do not fit, no weights are fetched."""
    merged = tmp_path / "merged"
    assert merge(hub, tmp_path, hub.repos["org/base"], hub.repos["me/adapter"], merged).returncode == 0
    hub.repos["me/merged"] = merged
    done = run(hub, tmp_path / "cache", "verify", "org/base", "me/adapter", "me/merged", "-q")
    assert (done.returncode, done.stdout) == (0, "agree\n"), done.stderr
    hub.sent.clear()
    other = make_base(tmp_path / "other", layers=1)
    hub.repos["org/other"] = other.path
    done = run(hub, tmp_path / "cache", "verify", "org/other", "me/adapter", "me/merged", "-q")
    assert done.returncode == 2
    sizes = [size for name, size in hub.sent if name.startswith("org/other/model-")]
    assert len(sizes) == 2
    assert sum(sizes) < 3000


def test_a_single_file_needs_no_index(hub, tmp_path):
    """Of a base that is one file on the Hub nothing is said about an index; its merge has the local one's bytes."""
    base = make_base(tmp_path / "single", shards=1)
    hub.repos["org/single"] = base.path
    done = merge(hub, tmp_path, "org/single", "me/adapter", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert "index" not in done.stdout + done.stderr
    assert merge(hub, tmp_path, base.path, "me/adapter", tmp_path / "local").returncode == 0
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "local" / weights).read_bytes()
