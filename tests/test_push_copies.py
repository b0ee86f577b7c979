"""Shards of a base on the same Hub that no adapter touches: copied there, or uploaded where the Hub does not copy."""

from __future__ import annotations

import json

import pytest

import dora_convert

from .hubserver import Hub, run
from .toy import Base, contents, make_adapter, make_base

SHARDS = [f"model-{number:05d}-of-00008.safetensors" for number in range(1, 9)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base of many shards, and a DoRA on one layer of it."""
    root = tmp_path_factory.mktemp("made")
    base = make_base(root / "base", shards=8, layers=4)
    first = Base(base.path, {name: tensor for name, tensor in base.tensors.items() if ".layers.0." in name})
    make_adapter(root / "adapter", first, dora=True)
    dora_convert.merge(root / "base", root / "adapter", root / "merged", undo="exact")
    return root


@pytest.fixture
def hub(made, tmp_path):
    server = Hub({"org/base": made / "base", "me/adapter": made / "adapter"}, tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def untouched(made):
    one, other = contents(made / "base"), contents(made / "merged")
    return {name for name in SHARDS if one[name] == other[name]}


WAYS = {"beside": ("OUT",), "hub to hub": ("--no-local",)}


def merge(hub, tmp_path, way):
    words = [tmp_path / "out" if word == "OUT" else word for word in WAYS[way]]
    return run(
        hub, tmp_path / "home", "merge", "org/base", "me/adapter", *words, "--push-to-hub", "me/merged",
        "--undo", "exact", "--json",
    )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_copied(hub, made, tmp_path, way):
    """Shards that are the base's bytes are not sent; the repo holds what it would otherwise."""
    done = merge(hub, tmp_path, way)
    assert done.returncode == 0, done.stderr
    same = untouched(made)
    assert 0 < len(same) < len(SHARDS)
    assert sorted(hub.copied) == sorted(same)
    pushed = json.loads(done.stdout)["pushed"]
    assert {file["path"] for file in pushed["files"] if file["state"] == "copied"} == same
    sent = contents(hub.repos["me/merged"])
    assert {name: sent[name] for name in SHARDS} == {name: contents(made / "merged")[name] for name in SHARDS}
    assert len(hub.uploads) == len(SHARDS) - len(same) + 1  # and the record
    assert pushed["bytes_uploaded"] == sum(len(data) for name, data in sent.items() if name not in same)


@pytest.mark.parametrize("how", ["says no", "fails", "has no such route"])
def test_uploaded_where_the_hub_does_not_copy(hub, made, tmp_path, how):
    """Asked once, told why, and then as if there were no copies."""
    if how == "says no":
        hub.copies = "no"
    else:
        hub.fail("lfs-files/duplicate", 400 if how == "fails" else 404, times=99)
    done = merge(hub, tmp_path, "hub to hub")
    assert done.returncode == 0, done.stderr
    assert hub.copied == []
    assert hub.seen("lfs-files/duplicate") == 1
    assert done.stderr.count("org/base copies nothing, so its files are uploaded: ") == 1
    assert {name for name in contents(hub.repos["me/merged"]) if name in SHARDS} == set(SHARDS)
    assert {file["state"] for file in json.loads(done.stdout)["pushed"]["files"]} == {"uploaded"}


@pytest.mark.parametrize("way", WAYS)
def test_copies_that_are_not_there(hub, made, tmp_path, way):
    """The commit is refused for want of them: the same command uploads, and never what has given its space back."""
    hub.copies = "lost"
    done = merge(hub, tmp_path, way)
    assert done.returncode == 2
    assert "points to an object that is not there" in done.stderr
    done = merge(hub, tmp_path, way)
    assert done.returncode == 0, done.stderr
    sent = contents(hub.repos["me/merged"])
    assert {name: sent[name] for name in SHARDS} == {name: contents(made / "merged")[name] for name in SHARDS}


def test_push_of_a_merged_folder(hub, made, tmp_path):
    """The receipt says which repo the base was."""
    words = ("org/base", "me/adapter", tmp_path / "out", "--undo", "exact")
    assert run(hub, tmp_path / "home", "merge", *words).returncode == 0
    done = run(hub, tmp_path / "home", "push", tmp_path / "out", "me/merged")
    assert done.returncode == 0, done.stderr
    same = untouched(made)
    assert sorted(hub.copied) == sorted(same)
    assert f"{len(same)} copied on the Hub" in done.stderr + done.stdout
    assert contents(hub.repos["me/merged"]) == contents(tmp_path / "out")
