"""--cluster with OUT in an object store: the node that has made a shard uploads it, and no folder is shared.

A stand-in takes Ray's place, and fsspec's store in memory that of S3. tests/oracles/cluster_stores.py has the real ones.
"""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

import dora_convert
from dora_convert.cluster import node_files, node_spool, shards, tensors
from dora_convert.errors import OutputError, UsageError, VerificationError
from dora_convert.parity.self_check import SelfCheck
from dora_convert.sources import object_store

from .quantised_bases import copy_base
from .quantised_bases import make_adapter as make_coded_adapter
from .stand_in import StandIn, connected_to, find_wrong
from .test_object_stores import BUCKET, stored, upload, weights
from .toy import contents, make_adapter, make_base

ADDRESS = f"{BUCKET}/out"


@pytest.fixture
def cluster(monkeypatch) -> StandIn:
    """The stand-in, to which --cluster connects."""
    return connected_to(StandIn(), monkeypatch)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base of several shards and an adapter, and their merge with an exact record."""
    root = tmp_path_factory.mktemp("pair")
    base = make_base(root / "base", layers=3)
    adapter = make_adapter(root / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, root / "merged", undo="exact", max_shard_size="12KB")
    return base.path, adapter, contents(root / "merged")


def merge(base, adapter, **options):
    return dora_convert.merge(base, adapter, ADDRESS, cluster="auto", undo="exact", max_shard_size="12KB", **options)


def test_everything_in_a_store(pair, cluster, store, tmp_path, monkeypatch):
    """The bytes of a local merge; nodes find no path of the driver's, and nothing stays on any machine."""
    base, adapter = upload(store, pair[0], "base"), upload(store, pair[1], "adapter")
    monkeypatch.setattr(node_files, "is_shared", lambda _: False)
    seen: list[tuple[int, int]] = []
    report = merge(base, adapter, on_progress=lambda *pair: seen.append(pair))
    out = stored(store, "out")
    assert out.keys() == pair[2].keys()
    assert weights(out) == weights(pair[2])
    assert len(cluster.done) > 4
    assert report.verified.wrong_elements == 0
    assert report.pushed.bytes_uploaded == sum(map(len, out.values()))
    assert seen[-1][0] == seen[-1][1] == report.bytes_written
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []


def test_inputs_that_all_nodes_see(pair, cluster, store, tmp_path):
    """Card and receipt, too, are those of a local merge into a store."""
    merge(pair[0], pair[1])
    assert stored(store, "out") == pair[2]


def test_out_on_a_shared_path_and_inputs_in_a_store(pair, cluster, store, tmp_path, monkeypatch):
    """Nodes read the base by ranges, and download the adapter."""
    base, adapter = upload(store, pair[0], "base"), upload(store, pair[1], "adapter")
    monkeypatch.setattr(node_files, "is_shared", lambda _: False)
    words = {"undo": "exact", "max_shard_size": "12KB", "cluster": "auto"}
    dora_convert.merge(base, adapter, tmp_path / "out", **words)
    assert weights(contents(tmp_path / "out")) == weights(pair[2])


@pytest.mark.parametrize("first", ["auto", None])
@pytest.mark.parametrize("second", ["auto", None])
def test_the_same_command_resumes(pair, cluster, store, monkeypatch, first, second):
    """After a killed driver only the rest is made, whoever began and whoever goes on."""
    put, sent = object_store.ObjectStore.put, []

    def failing(self, name, path):
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(name) if name.endswith(".safetensors") else None
        return put(self, name, path)

    words = {"undo": "exact", "max_shard_size": "12KB", "workers": 1}
    monkeypatch.setattr(node_spool, "KEPT_BYTES", 100)
    monkeypatch.setattr(object_store.ObjectStore, "put", failing)
    with pytest.raises(KeyboardInterrupt):
        dora_convert.merge(pair[0], pair[1], ADDRESS, cluster=first, **words)
    kept = {name: file for name, file in object_store.ObjectStore(ADDRESS).files().items() if name in sent}
    assert len(kept) == 3
    assert "config.json" not in stored(store, "out")
    monkeypatch.setattr(object_store.ObjectStore, "put", put)
    store.pipe_file(f"/{ADDRESS.partition('://')[2]}/dora_convert/{tensors.CLAIM}", b"left by a driver that was killed")
    cluster.done.clear()
    report = dora_convert.merge(pair[0], pair[1], ADDRESS, cluster=second, **words)
    assert report.resumed
    assert stored(store, "out") == pair[2]
    later = object_store.ObjectStore(ADDRESS).files()
    assert {name for name in kept if later[name] == kept[name]} >= {*sent[:2]}
    assert not {shard for unit in cluster.done for shard in unit} & {*sent[:2]}


def test_a_late_node_uploads_nothing(pair, cluster, store, monkeypatch):
    """A task of a killed run finds another run's claim."""
    uploaded = shards.ShardWork._uploaded

    def claimed_by_another(work, unit, folder):
        if len(cluster.done) == 2:
            object_store.ObjectStore(ADDRESS).write(f"dora_convert/{tensors.CLAIM}", b"another")
        return uploaded(work, unit, folder)

    monkeypatch.setattr(shards.ShardWork, "_uploaded", claimed_by_another)
    with pytest.raises(OutputError, match="belongs to another run now"):
        merge(pair[0], pair[1])
    assert len([name for name in stored(store, "out") if name.endswith("0.safetensors")]) <= 2


def test_a_node_without_the_store(pair, cluster, store):
    """It is named before anything is written."""
    cluster.facts = {"refused": "memory://bucket/out cannot be read: no credentials were found."}
    with pytest.raises(UsageError, match="Node second: memory://bucket/out cannot be read: no credentials"):
        merge(pair[0], pair[1])
    assert stored(store, "out") == {}


def test_a_node_that_finds_another_base(pair, cluster, store, monkeypatch):
    """The listing's hash tells."""
    base = upload(store, pair[0], "base")
    ask = cluster.ask

    def changed(question, late=None):
        return ask(replace(question, stores={**question.stores, base: "another"}), late)

    monkeypatch.setattr(cluster, "ask", changed)
    with pytest.raises(UsageError, match="bucket/base holds other files than this machine finds there"):
        merge(base, pair[1])


def test_a_full_disk_on_a_node(pair, cluster, store, monkeypatch):
    """The error names the node, its folder is removed, and the same command goes on."""
    write = shards.ShardFiles.write

    def full(self, *words):
        if len(cluster.done) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *words)

    monkeypatch.setattr(shards.ShardFiles, "write", full)
    monkeypatch.setattr(tensors, "node_name", lambda: "node-7")
    with pytest.raises(OutputError, match="No space left on device, on node node-7"):
        merge(pair[0], pair[1])
    monkeypatch.setattr(shards.ShardFiles, "write", write)
    assert merge(pair[0], pair[1]).resumed
    assert stored(store, "out") == pair[2]


def test_a_wrong_tensor_is_not_uploaded(pair, cluster, store, monkeypatch):
    """The self-check runs on the node; the shard is made again by the same command."""
    check = SelfCheck.check_all
    find_wrong("model.layers.1.mlp.up_proj.weight", monkeypatch)
    with pytest.raises(VerificationError, match="1 tensors on disk"):
        merge(pair[0], pair[1])
    count = len([name for name in stored(store, "out") if name.endswith(".safetensors")])
    assert count == len(cluster.done) - 1
    monkeypatch.setattr(SelfCheck, "check_all", check)
    assert merge(pair[0], pair[1]).resumed
    assert stored(store, "out") == pair[2]


@pytest.mark.parametrize("kind", ["fp8-blocks", "ct-int8-asymmetric"])
def test_shards_that_share_a_weight_are_made_together(cluster, store, tmp_path, kind):
    """A weight that is coded again may have its parts in two shards."""
    base = copy_base(kind, tmp_path / "base")
    adapter = make_coded_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base, adapter, tmp_path / "here", max_shard_size="6KB")
    dora_convert.merge(base, adapter, ADDRESS, max_shard_size="6KB", cluster="auto")
    assert stored(store, "out") == contents(tmp_path / "here")
    assert max(map(len, cluster.done)) > 1
    assert len(cluster.done) > 1
    made = [shard for unit in cluster.done for shard in unit]
    assert sorted(made) == sorted(name for name in stored(store, "out") if name.startswith("model-"))
