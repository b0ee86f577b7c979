"""--no-cache: what verbs read of the Hub streams through this machine, and nothing of it stays."""

from __future__ import annotations

import json
import shutil

import pytest

import dora_convert
from dora_convert.sources import Session

from .hubserver import Hub, run
from .test_outputs import merged
from .toy import contents, make_adapter, make_base

SHARDS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base of many shards, a LoRA and a DoRA for it, and the base with the DoRA merged."""
    root = tmp_path_factory.mktemp("made")
    base = make_base(root / "base", shards=SHARDS, layers=4)
    make_adapter(root / "lora", base, dora=False)
    make_adapter(root / "dora", base, dora=True)
    dora_convert.merge(root / "base", root / "dora", root / "merged", undo="exact")
    dora_convert.merge(root / "base", root / "dora", root / "bare", undo="none")
    return root


@pytest.fixture
def hub(made, tmp_path):
    """A Hub with all of it, that counts the weight files here whenever it is asked for one."""
    names = {"org/base": "base", "me/lora": "lora", "me/dora": "dora", "me/merged": "merged", "me/bare": "bare"}
    server = Hub({repo: made / name for repo, name in names.items()}, tmp_path)
    server.most = 0

    def look(name):
        if "model-0" in name:
            server.most = max(server.most, len(list((tmp_path / "home").rglob("model-0*-of-*.safetensors"))))

    server.on_read = look
    yield server
    server.shutdown()
    server.server_close()


VERBS = {
    "from-lora": ("org/base", "me/lora", "OUT"),
    "to-lora": ("org/base", "me/dora", "OUT", "--rank", "2"),
    "to-lora, read twice": ("org/base", "me/dora", "OUT", "--max-error", "0.2"),
    "extract": ("org/base", "me/merged", "OUT", "--rank", "2", "--kind", "lora"),
    "unmerge": ("me/merged", "me/dora", "OUT"),
    "unmerge --base": ("me/bare", "me/dora", "OUT", "--base", "org/base"),
    "verify": ("org/base", "me/dora", "me/merged"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_same_and_nothing_stays(hub, made, tmp_path, verb):
    """As from folders; of many shards a few are here at a time, and in the end none, nor anything else."""
    far = [str(tmp_path / "far") if word == "OUT" else word for word in VERBS[verb]]
    near = [str(tmp_path / "near") if word == "OUT" else str(hub.repos.get(word, word)) for word in VERBS[verb]]
    home = tmp_path / "home"
    verb = verb.partition(" ")[0].strip(",")
    done = run(hub, home, verb, *far, "--no-cache", "--workers", "1", "--json")
    assert done.returncode == 0, done.stderr
    local = run(hub, home, verb, *near, "--workers", "1", "--json")
    assert local.returncode == 0, local.stderr
    if verb == "verify":
        assert json.loads(done.stdout)["modules"] == json.loads(local.stdout)["modules"]
    else:
        one, other = contents(tmp_path / "far"), contents(tmp_path / "near")
        assert one.keys() == other.keys()
        assert {name for name in one if one[name] != other[name]} <= {"README.md", "adapter_config.json"}
    assert hub.most <= 4
    assert [path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    assert list((home / "dora_convert/visits").iterdir()) == []


def test_with_the_cache_all_are_here(hub, tmp_path):
    """As they are counted above."""
    assert run(hub, tmp_path / "home", "verify", *VERBS["verify"]).returncode == 0
    assert hub.most > 4


def test_only_what_is_read(hub, tmp_path):
    """Shards that hold nothing an adapter is made of are not downloaded, with the cache or without."""
    words = ("from-lora", "org/base", "me/lora", "--include", "model.layers.0.*")
    for name, more in {"kept": (), "not": ("--no-cache",)}.items():
        hub.sent.clear()
        done = run(hub, tmp_path / f"{name} home", *words[:3], tmp_path / name, *words[3:], *more)
        assert done.returncode == 0, done.stderr
        sizes = {path.name: path.stat().st_size for path in hub.repos["org/base"].glob("*.safetensors")}
        whole = {file for file, sent in hub.sent if sent == sizes.get(file.rpartition("/")[2])}
        assert 0 < len(whole) < SHARDS / 2
    assert contents(tmp_path / "kept") == contents(tmp_path / "not")


def test_folders_inside_repos(hub, made, tmp_path):
    """A base that is a folder of a repo, whose files come to where they are read."""
    (tmp_path / "all").mkdir()
    for name in ("base", "dora"):
        shutil.copytree(made / name, tmp_path / "all" / name)
    hub.repos["me/all"] = tmp_path / "all"
    words = ("hf://me/all/base", "hf://me/all/dora", tmp_path / "out", "--no-cache", "--undo", "exact")
    done = run(hub, tmp_path / "home", "merge", *words)
    assert done.returncode == 0, done.stderr
    weights = {name: data for name, data in contents(made / "merged").items() if name.endswith(".safetensors")}
    assert weights.items() <= contents(tmp_path / "out").items()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_inspect(hub, tmp_path):
    """An adapter is read, and does not stay."""
    done = run(hub, tmp_path / "home", "inspect", "me/dora", "--base", "org/base", "--no-cache", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["landing"]["fits"]
    assert list((tmp_path / "home").rglob("*.safetensors")) == []


def test_failures(hub, tmp_path):
    """A download that fails while workers wait for it: the Hub's words, nothing written, nothing left."""
    hub.fail("GET /me/merged/resolve/.*model-00003", 403, skip=1, times=9, message="not for you")
    words = ("unmerge", "me/merged", "me/dora", tmp_path / "out", "--no-cache")
    done = run(hub, tmp_path / "home", *words)
    assert done.returncode == 2
    assert "not for you" in done.stderr
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "home").rglob("*.safetensors")) == []


def test_what_killed_runs_left_is_removed(tmp_path, monkeypatch):
    """The next run removes folders that nobody holds, and leaves others alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    left = tmp_path / "dora_convert/visits/left"
    (left / "org--base@1").mkdir(parents=True)
    (left / "org--base@1/model.safetensors").write_bytes(b"half of it")
    with Session(None, cache=False) as first:
        held = first.place("org/base", "1")
        held.mkdir()
        assert not left.exists()
        with Session(None, cache=False) as second:
            second.place("org/base", "1")
            assert held.exists()
    assert list(left.parent.iterdir()) == []


@pytest.mark.parametrize("verb", ["verify", "unmerge", "extract"])
def test_what_was_here_stays(hub, made, tmp_path, verb):
    """One checkpoint is a folder, the other a repo: the folder's files are no guests."""
    base = shutil.copytree(made / "base", tmp_path / "base")
    dora_convert.merge(base, made / "dora", tmp_path / "plain", undo="norms")
    hub.repos["me/plain"] = tmp_path / "plain"
    words = {
        "verify": (base, "me/dora", "me/merged"),
        "unmerge": ("me/plain", "me/dora", tmp_path / "out", "--base", base),
        "extract": (base, "me/merged", tmp_path / "out", "--rank", "2"),
    }
    done = run(hub, tmp_path / "home", verb, *words[verb], "--no-cache")
    assert done.returncode == 0, done.stderr
    assert contents(base) == contents(made / "base")


def test_models_that_are_run(hub, tmp_path):
    """A model that is run is downloaded whole, and removed as well."""
    base, adapter, out = merged(tmp_path)
    hub.repos |= {"org/tiny": base, "me/tiny": adapter, "me/out": out}
    words = ("org/tiny", "me/tiny", "me/out", "--level", "outputs", "--no-cache", "--json")
    done = run(hub, tmp_path / "home", "verify", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "agree"
    words = ("org/tiny", "me/tiny", tmp_path / "again", "--verify-outputs", "--no-cache", "--json")
    done = run(hub, tmp_path / "home", "merge", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"]["verdict"] == "agree"
    assert not list((tmp_path / "home").rglob("*.safetensors"))
