"""--cluster: tasks go out as data and results come back to one journal; the bytes are those of a local run.

A stand-in takes Ray's place: it pickles all that a cluster would send, and runs in this process.
`make cluster` does the same on Ray, with nodes that die.
"""

from __future__ import annotations

import errno

import pytest

import dora_convert
from dora_convert import settings
from dora_convert.cluster import jobs, node_spool, tensors
from dora_convert.errors import OutputError, UsageError
from dora_convert.output.finished import Task
from dora_convert.output.shards import Copy

from .stand_in import StandIn, connected_to
from .toy import contents, make_adapter, make_base


@pytest.fixture
def cluster(monkeypatch) -> StandIn:
    """The stand-in, to which --cluster connects; small tasks."""
    monkeypatch.setattr(jobs, "TASK_BYTES", 1 << 12)
    return connected_to(StandIn(), monkeypatch)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base, an adapter, and the folder that they are in."""
    root = tmp_path_factory.mktemp("pair")
    base = make_base(root / "base", layers=3)
    return base.path, make_adapter(root / "adapter", base, dora=True), root


@pytest.mark.parametrize("undo", ["norms", "exact"])
def test_bytes_are_those_of_a_local_merge(pair, cluster, tmp_path, undo, monkeypatch):
    """Weights, record, receipt and card are equal, and nothing else is left; a long record passes through a file."""
    base, adapter, _ = pair
    monkeypatch.setattr(node_spool, "KEPT_BYTES", 100 if undo == "exact" else 1 << 20)
    seen: list[tuple[int, int]] = []
    dora_convert.merge(base, adapter, tmp_path / "here", undo=undo)
    report = dora_convert.merge(
        base, adapter, tmp_path / "out", undo=undo, cluster="auto", on_progress=lambda *pair: seen.append(pair)
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "here")
    assert report.verified.wrong_elements == 0
    assert len(cluster.done) > 5
    assert seen[-1][0] == seen[-1][1] == report.bytes_written
    assert {path.name for path in tmp_path.iterdir()} == {"here", "out"}


@pytest.mark.parametrize("undo", ["norms", "exact"])
def test_unmerge(pair, cluster, tmp_path, undo):
    """The base comes back, with the bytes of a local unmerge."""
    base, adapter, _ = pair
    dora_convert.merge(base, adapter, tmp_path / "merged", undo=undo)
    dora_convert.unmerge(tmp_path / "merged", adapter, tmp_path / "here")
    report = dora_convert.unmerge(tmp_path / "merged", adapter, tmp_path / "out", cluster="auto")
    assert contents(tmp_path / "out") == contents(tmp_path / "here")
    assert len(cluster.done) > 5
    assert undo != "exact" or report.exact["bit_exact"] == report.exact["tensors"] > 0


def test_verify(pair, cluster, tmp_path):
    """Rows of the report are tasks, too; a difference is found on whichever node compares it."""
    base, adapter, _ = pair
    dora_convert.merge(base, adapter, tmp_path / "merged")
    here = dora_convert.verify(base, adapter, tmp_path / "merged").to_dict()
    there = dora_convert.verify(base, adapter, tmp_path / "merged", cluster="auto").to_dict()
    assert there | {"seconds": 0} == here | {"seconds": 0}
    assert len(cluster.done) > 5
    shard = min((tmp_path / "merged").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert dora_convert.verify(base, adapter, tmp_path / "merged", cluster="auto").verdict == "differ"


def test_the_same_command_resumes(pair, cluster, tmp_path):
    """After an interruption, here or on the cluster, only the rest is done."""
    base, adapter, _ = pair
    dora_convert.merge(base, adapter, tmp_path / "here", cluster="auto")
    tasks, cluster.done = list(cluster.done), []
    cluster.allowed = len(tasks) - 2
    with pytest.raises(KeyboardInterrupt):
        dora_convert.merge(base, adapter, tmp_path / "out", cluster="auto")
    first, cluster.allowed, cluster.done = list(cluster.done), 10**9, []
    report = dora_convert.merge(base, adapter, tmp_path / "out", cluster="auto")
    assert report.resumed
    assert first + cluster.done == tasks
    assert contents(tmp_path / "out") == contents(tmp_path / "here")


def test_a_local_run_goes_on_with_a_clusters(pair, cluster, tmp_path):
    """The journal is the same, and the claim of the cluster's run is not published."""
    base, adapter, _ = pair
    cluster.allowed = 3
    with pytest.raises(KeyboardInterrupt):
        dora_convert.merge(base, adapter, tmp_path / "out", cluster="auto")
    (tmp_path / "out.partial/dora_convert" / tensors.CLAIM).write_text("a driver that was killed")
    assert dora_convert.merge(base, adapter, tmp_path / "out").resumed
    dora_convert.merge(base, adapter, tmp_path / "here")
    assert contents(tmp_path / "out") == contents(tmp_path / "here")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"versions": ("dora-convert 0.0.1",)}, "Node second has dora-convert 0.0.1"),
        ({"missing": ("/data/model.safetensors",)}, "Node second does not see /data/model.safetensors"),
    ],
)
def test_a_node_that_cannot_take_part(pair, cluster, tmp_path, facts, words):
    """It is named before anything is written."""
    cluster.facts = facts
    with pytest.raises(UsageError, match=words):
        dora_convert.merge(pair[0], pair[1], tmp_path / "out", cluster="auto")
    assert list(tmp_path.iterdir()) == []


def test_a_node_without_outs_folder(pair, cluster, tmp_path, monkeypatch):
    """The token beside OUT is not found there."""
    ask = cluster.ask

    def without_path(question, late=None):
        token = next(path for path in question.heads if path.endswith(".token"))
        cluster.facts = {"missing": (token,)}
        return ask(question, late)

    monkeypatch.setattr(cluster, "ask", without_path)
    with pytest.raises(UsageError, match=f"Node second does not see the folder {tmp_path}, where OUT is written"):
        dora_convert.merge(pair[0], pair[1], tmp_path / "out", cluster="auto")
    assert list(tmp_path.iterdir()) == []


def test_another_processor_is_told(pair, cluster, tmp_path):
    """Products of matrices may have other last bits there."""
    cluster.facts = {"processor": "Z80"}
    report = dora_convert.merge(pair[0], pair[1], tmp_path / "out", cluster="auto")
    assert any("Z80" in warning for warning in report.warnings)


def test_a_full_disk_on_a_node(pair, cluster, tmp_path, monkeypatch):
    """The error names the node, what is done is kept, and the same command goes on."""
    write, count = tensors.SharedShards.write, 0

    def full(self, *words):
        nonlocal count
        count += 1
        if count > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *words)

    monkeypatch.setattr(tensors.SharedShards, "write", full)
    monkeypatch.setattr(tensors, "node_name", lambda: "node-7")
    with pytest.raises(OutputError, match="No space left on device, on node node-7") as caught:
        dora_convert.merge(pair[0], pair[1], tmp_path / "out", cluster="auto")
    assert caught.value.outcome == "What is done is kept."
    monkeypatch.setattr(tensors.SharedShards, "write", write)
    assert dora_convert.merge(pair[0], pair[1], tmp_path / "out", cluster="auto").resumed


def test_a_late_task_writes_nothing(pair, cluster, tmp_path, monkeypatch):
    """A task of a killed run finds another run's claim."""
    refuse = tensors.TensorJob._refuse_late

    def claimed_by_another(job):
        if len(cluster.done) == 2:
            (job.folder / "dora_convert" / tensors.CLAIM).write_text("another")
        refuse(job)

    monkeypatch.setattr(tensors.TensorJob, "_refuse_late", claimed_by_another)
    with pytest.raises(OutputError, match="belongs to another run now"):
        dora_convert.merge(pair[0], pair[1], tmp_path / "out", cluster="auto")
    assert len(cluster.done) == 2


def test_tasks_are_grouped():
    """Tensors of one shard and one kind go together, up to some bytes; copies stay alone."""
    copy = Task("copy", "a", copy=Copy(None, 0, "a", 0, 5))
    tasks = [copy, *(Task("write", shard, (name,)) for shard, name in ("ax", "ay", "az", "bw"))]
    sizes = {"x": 20 << 20, "y": 10 << 20, "z": 5 << 20, "w": 1}
    groups = list(tensors.grouped(tasks, sizes, 2))
    assert [group.names for group in groups] == [(), ("x", "y"), ("z",), ("w",)]
    assert list(jobs.ranges([30 << 20] * 4 + [1 << 19] * 9, 1)) == [range(2), range(2, 3), range(3, 8), range(8, 13)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cluster": "local:0"}, "is not one of auto, local, local:N, ray://HOST:PORT"),
        ({"cluster": "ray://host"}, "is not one of"),
        ({"cluster": "auto", "in_place": True, "out": None}, "changes a checkpoint on one machine"),
        ({"cluster": "auto", "device": "mps"}, "mps. does not go with|mps does not go with"),
        ({"cluster": "auto", "device": "cuda"}, "No node of the cluster has a CUDA device"),
    ],
)
def test_what_does_not_go_with_a_cluster(pair, cluster, tmp_path, options, words):
    """Each is refused before anything is written."""
    with pytest.raises(UsageError, match=words):
        dora_convert.merge(pair[0], pair[1], **{"out": tmp_path / "out"} | options)
    assert list(tmp_path.iterdir()) == []


def test_without_ray(pair, tmp_path, monkeypatch):
    """The error says what to install."""
    monkeypatch.setattr(settings, "_is_installed", lambda name: name != "ray")
    with pytest.raises(UsageError, match="needs ray, which is not installed") as caught:
        dora_convert.merge(pair[0], pair[1], tmp_path / "out", cluster="local")
    assert caught.value.hint == "pip install 'dora-convert[ray]'"
    assert list(tmp_path.iterdir()) == []
