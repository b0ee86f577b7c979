"""--cluster with --push-to-hub --no-local: the node that has made a shard uploads it to the Hub, the command commits.

A stand-in takes Ray's place; the Hub is a real HTTP server on loopback.
"""

from __future__ import annotations

import pytest
from huggingface_hub import constants

import dora_convert
from dora_convert.cluster import node_files
from dora_convert.errors import HubError, UsageError, VerificationError
from dora_convert.hub import node_upload

from .stand_in import StandIn, connected_to, find_wrong
from .toy import contents, make_adapter, make_base

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's own upload
OPTIONS = {"push_to_hub": "me/merged", "no_local": True, "cluster": "auto", "undo": "exact", "max_shard_size": "12KB"}


@pytest.fixture
def cluster(monkeypatch, hub, tmp_path) -> StandIn:
    """The stand-in, to which --cluster connects; this process and its nodes know the Hub and a token."""
    home, template = tmp_path / "home", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return connected_to(StandIn(), monkeypatch)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base of several shards and an adapter, and their merge with an exact record."""
    root = tmp_path_factory.mktemp("pair")
    base = make_base(root / "base", layers=3)
    adapter = make_adapter(root / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, root / "merged", undo="exact", max_shard_size="12KB")
    return base.path, adapter, contents(root / "merged")


def shards_of(files) -> dict:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def left_here(home) -> list:
    """Files that stay on this machine, but for locks and huggingface_hub's own."""
    return [path for path in (home / "dora_convert").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_from_a_folder_to_the_hub(pair, cluster, hub, tmp_path):
    """The repo holds what a local merge writes; one commit, each shard sent once, and nothing stays here."""
    report = dora_convert.merge(*pair[:2], **OPTIONS)
    repo = contents(hub.repos["me/merged"])
    assert shards_of(repo) == shards_of(pair[2])
    assert repo.keys() == pair[2].keys()
    assert len(hub.state["me/merged"].commits) == 2
    assert len(hub.uploads) == len(set(hub.uploads)) == len(shards_of(repo))
    assert {shard for unit in cluster.done for shard in unit} >= shards_of(repo).keys() - {
        "dora_convert/undo.safetensors"
    }
    assert report.pushed.bytes_uploaded == sum(map(len, repo.values()))
    assert report.verified.wrong_elements == 0
    assert left_here(tmp_path / "home") == []


def test_from_hub_to_hub(pair, cluster, hub, monkeypatch):
    """Nodes download what they read to their own caches, and see no path of this machine."""
    hub.repos |= {"org/base": pair[0], "me/adapter": pair[1]}
    monkeypatch.setattr(node_files, "is_shared", lambda _: False)
    dora_convert.merge("org/base", "me/adapter", **OPTIONS)
    assert shards_of(contents(hub.repos["me/merged"])) == shards_of(pair[2])


@pytest.mark.parametrize("second", ["auto", None])
def test_the_same_command_resumes(pair, cluster, hub, second):
    """After a killed driver only the rest is made and sent, whoever goes on."""
    cluster.allowed = 3
    with pytest.raises(KeyboardInterrupt):
        dora_convert.merge(*pair[:2], **OPTIONS)
    before = list(hub.uploads)
    assert len(before) == 3
    assert len(hub.state["me/merged"].commits) == 1
    cluster.allowed = 10**9
    report = dora_convert.merge(*pair[:2], **{**OPTIONS, "cluster": second})
    assert report.resumed
    assert len(hub.uploads) == len(set(hub.uploads))
    assert shards_of(contents(hub.repos["me/merged"])) == shards_of(pair[2])


def test_a_node_without_a_token(pair, cluster, hub):
    """It is named before anything is made."""
    cluster.facts = {"refused": "me/merged: the Hub does not know who you are"}
    with pytest.raises(UsageError, match="Node second: me/merged: the Hub does not know who you are"):
        dora_convert.merge(*pair[:2], **OPTIONS)
    assert hub.uploads == []


def test_every_node_asks_the_hub(pair, cluster, hub):
    """The question that nodes get needs a token that the Hub knows."""
    hub.fail("whoami", 401)
    with pytest.raises(UsageError, match=r"Node .*me/merged: the Hub does not know who you are"):
        dora_convert.merge(*pair[:2], **OPTIONS)
    assert hub.uploads == []


def test_an_upload_that_the_hub_refuses(pair, cluster, hub):
    """No commit; the same command sends the rest."""
    hub.fail("objects/batch", 402, message="storage is full", skip=2)
    with pytest.raises(HubError, match="storage is full"):
        dora_convert.merge(*pair[:2], **OPTIONS)
    assert len(hub.state["me/merged"].commits) == 1
    assert dora_convert.merge(*pair[:2], **OPTIONS).resumed
    assert len(hub.uploads) == len(set(hub.uploads))
    assert shards_of(contents(hub.repos["me/merged"])) == shards_of(pair[2])


def test_a_repo_that_keeps_weights_in_git(pair, cluster, hub, monkeypatch):
    """A node cannot commit, and says why."""
    monkeypatch.setattr(node_upload, "is_uploaded", lambda _: False)
    with pytest.raises(HubError, match=r"keeps model-.* in git itself"):
        dora_convert.merge(*pair[:2], **OPTIONS)


def test_a_wrong_tensor_is_not_uploaded(pair, cluster, hub, monkeypatch):
    """The self-check runs on the node; nothing is committed."""
    find_wrong("model.layers.1.mlp.up_proj.weight", monkeypatch)
    with pytest.raises(VerificationError, match="1 tensors on disk"):
        dora_convert.merge(*pair[:2], **OPTIONS)
    assert len(hub.uploads) == len(cluster.done) - 1
    assert len(hub.state["me/merged"].commits) == 1
