"""Inputs on their way: one after the other, ahead of their use, and never more on the disk than is allowed."""

from __future__ import annotations

import shutil
import threading

import pytest

from dora_convert.errors import HubError
from dora_convert.plan.plan import Options
from dora_convert.plan.planner import make_plan
from dora_convert.sources.inputs import read_adapter
from dora_convert.sources.prefetch import Prefetch, shard_needs
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.refs import local_source

from .toy import make_adapter, make_base


@pytest.fixture
def plan(tmp_path):
    """The plan of a merge into six shards, whose base has gone to another folder once its headers were read."""
    base = make_base(tmp_path / "base", shards=6)
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    opened = [read_adapter(local_source(adapter))]
    made = make_plan(open_checkpoint(local_source(base.path)), opened, (1.0,), Options())
    shutil.move(base.path, tmp_path / "far")
    base.path.mkdir()
    return made


class Disk:
    """What is on it, and the most that ever was."""

    def __init__(self, root):
        self._root, self._names, self.most, self.downloaded = root, set(), 0, []
        self._lock = threading.Lock()

    def add(self, name):
        with self._lock:
            self._names.add(name)
            self.most = max(self.most, len(self._names))

    def remove(self, name):
        with self._lock:
            self._names.discard(name)

    def download(self, path):
        self.add(f"in {path.name}")
        self.downloaded.append(path.name)
        shutil.copy(self._root / "far" / path.name, path)


def merge_all(plan, disk, inputs):
    """Make every output as workers would, with an uploader of its own that is always late."""
    uploads = []
    for shard in plan.shards:
        path = next(path for path in inputs.inputs if path.name == shard.filename)
        inputs.need(path)
        assert path.exists()
        disk.add(f"out {shard.filename}")

        def uploaded(name=shard.filename):
            disk.remove(f"out {name}")
            inputs.uploaded(name)

        disk.remove(f"in {path.name}")  # `done` removes the file
        inputs.done(shard.filename)
        assert not path.exists()
        uploads.append(threading.Timer(0.02, uploaded))
        uploads[-1].start()
    for upload in uploads:
        upload.join()


def test_three_files(plan, tmp_path):
    """Inputs and outputs together are never more than three; each input comes once, in order."""
    disk = Disk(tmp_path)
    inputs = Prefetch(shard_needs(plan), disk.download, keep=False, most_files=3, outputs=True)
    merge_all(plan, disk, inputs)
    inputs.close()
    assert disk.most <= 3
    assert disk.downloaded == [shard.filename for shard in plan.shards]


def test_ahead_of_use(plan, tmp_path):
    """While one shard is merged the next arrives."""
    disk, second = Disk(tmp_path), threading.Event()

    def download(path):
        disk.download(path)
        if len(disk.downloaded) == 2:
            second.set()

    inputs = Prefetch(shard_needs(plan), download, keep=True)
    inputs.need(inputs.inputs[0])
    assert second.wait(30)
    inputs.close()


def test_failures_and_the_end_wake_who_waits(plan):
    """A download that fails is raised where its file is needed; a stop is not waited through."""

    def fail(path):
        raise HubError("no")

    inputs = Prefetch(shard_needs(plan), fail, keep=True)
    with pytest.raises(HubError, match="no"):
        inputs.need(inputs.inputs[0])
    held, reached = threading.Event(), threading.Event()

    def hold(path):
        reached.set()
        held.wait(30)

    inputs = Prefetch(shard_needs(plan), hold, keep=True)
    threading.Thread(target=lambda: (reached.wait(30), inputs.close())).start()
    with pytest.raises(HubError, match="was stopped"):
        inputs.need(inputs.inputs[0])
    held.set()
