"""Shards that are written past the page cache: the same bytes, whole pages, and the usual errors."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

import dora_convert
from dora_convert.errors import OutputError
from dora_convert.output import shards

from .toy import contents, make_adapter, make_base, stopped

PAGE = 1024

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs a system that can be advised")


@dataclass
class Writes:
    """Stands for os.pwritev: as if the system knew the flag, with writes that are cut short, refused or fail."""

    refused: int = 0
    most: int = 1 << 30
    full_after: int = 1 << 30
    calls: list[tuple[int, int, int]] = field(default_factory=list)

    def __call__(self, descriptor, parts, position, flags):
        if len(self.calls) >= self.full_after:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.calls.append((position, sum(map(len, parts)), flags))
        if flags and self.refused:
            raise OSError(self.refused, os.strerror(self.refused))
        return os.pwrite(descriptor, b"".join(parts)[: self.most], position)


@pytest.fixture
def writes(monkeypatch):
    """Small pages, small tensors, and the system's calls."""
    monkeypatch.setattr(shards, "UNCACHED", 0x80)
    monkeypatch.setattr(shards, "PAGE", PAGE)
    monkeypatch.setattr(shards, "LEAST_UNCACHED", 100)
    monkeypatch.setattr(shards, "UNCACHED_SLICE", 4 * PAGE)
    writes = Writes()
    monkeypatch.setattr(os, "pwritev", writes)
    return writes


def made(folder, sizes, header=b""):
    """The shards of a plan of one shard with tensors of these sizes, and its items."""
    items = [SimpleNamespace(name=str(k), nbytes=size, dtype="U8", shape=(size,)) for k, size in enumerate(sizes)]
    shard = SimpleNamespace(filename="s", items=items, metadata={"odd": header.decode()}, prefix="")
    return shards.ShardFiles(folder, SimpleNamespace(shards=[shard], items=items), create=True, cached=False), items


def fill(files, item, data, chance):
    """Write a tensor in pieces of random sizes."""
    at = 0
    while at < len(data):
        length = min(chance.choice((1, 7, 100, PAGE, 5000, 9000)), len(data) - at)
        files.write(item, at, memoryview(data)[at : at + length])
        at += length


@pytest.mark.parametrize("limits", [{}, {"most": 700}, {"refused": errno.EOPNOTSUPP}, {"refused": errno.EINVAL}])
@pytest.mark.parametrize("header", [b"", b"12345678" * 3])
def test_bytes_and_pages(tmp_path, writes, limits, header):
    """Tensors of any size at any offset, by three threads: no write but a tensor's first and last cuts a page."""
    vars(writes).update(limits)
    sizes = [0, 1, 40, 99, 100, 101, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 20_001, 33_333, 0, 9000, 50_000]
    files, items = made(tmp_path, sizes, header)
    want = {item.name: random.Random(item.name).randbytes(item.nbytes) for item in items}

    def work(k):
        for item in items[k::3]:
            fill(files, item, want[item.name], random.Random(k))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files.close()
    written = (tmp_path / "s").read_bytes()
    assert written.endswith(b"".join(want.values()))
    assert not files._tails
    start = len(written) - sum(sizes)
    ends = {0, start}
    for size in sizes:
        ends.add(start := start + size)
    flagged = [(at, at + length) for at, length, flags in writes.calls if flags]
    assert flagged
    if limits.get("refused"):
        assert len(flagged) <= 3  # one for each thread
    elif not limits:
        assert all(edge % PAGE == 0 or edge in ends for write in flagged for edge in write)
        assert all(stop - start <= 4 * PAGE for start, stop in flagged)


def test_begun_again(tmp_path, writes):
    """A tensor whose first attempt ended in the middle of a page is written from its beginning."""
    files, (before, item) = made(tmp_path, [10, 10_000])
    files.write(item, 0, memoryview(bytes(2500)))
    data = random.Random(1).randbytes(10_000)
    fill(files, item, data, random.Random(2))
    files.write(before, 0, memoryview(b"0123456789"))
    files.close()
    assert (tmp_path / "s").read_bytes().endswith(b"0123456789" + data)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base and an adapter on it, and their merge, whose tensors are too small to be written past the page cache."""
    root = tmp_path_factory.mktemp("pair")
    base = make_base(root / "base", layers=3)
    adapter = make_adapter(root / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, root / "whole")
    return base.path, adapter, contents(root / "whole")


@pytest.mark.parametrize("limits", [{}, {"refused": errno.EOPNOTSUPP}, {"most": 1000}])
def test_same_output(tmp_path, pair, writes, limits):
    """A merge writes the same files, in one run or two."""
    base, adapter, whole = pair
    vars(writes).update(limits)
    dora_convert.merge(base, adapter, tmp_path / "out")
    assert writes.calls
    assert contents(tmp_path / "out") == whole
    with stopped():
        dora_convert.merge(base, adapter, tmp_path / "two", workers=1)
    assert dora_convert.merge(base, adapter, tmp_path / "two").resumed
    assert contents(tmp_path / "two") == whole


def test_disk_full(tmp_path, pair, writes):
    """A write that fails is the run's error, and the same command goes on."""
    base, adapter, whole = pair
    writes.full_after = 5
    with pytest.raises(OutputError, match="No space left on device"):
        dora_convert.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    writes.full_after = 1 << 30
    dora_convert.merge(base, adapter, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("release", "flag"), [("6.18.44-fc-v509", 0x80), ("6.16", 0x80), ("6.15.2", 0), ("5.10-x", 0), ("odd", 0)]
)
def test_which_systems(monkeypatch, release, flag):
    """Linux has the flag since 6.14; its first versions are left alone."""
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    monkeypatch.setattr(shards.sys, "platform", "linux")
    assert shards._uncached() == flag


def test_this_system(tmp_path, pair, monkeypatch):
    """Whatever this system and its file systems know of the flag."""
    base, adapter, whole = pair
    monkeypatch.setattr(shards, "LEAST_UNCACHED", 100)
    dora_convert.merge(base, adapter, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_pages_are_let_go(tmp_path, pair, monkeypatch):
    """Once they are synced, pages of new shards leave the cache; those of a model that is changed in place stay."""
    base, adapter, _ = pair
    forgotten, advise = [], os.posix_fadvise

    def advises(descriptor, start, length, advice):
        if advice == os.POSIX_FADV_DONTNEED:
            forgotten.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        advise(descriptor, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", advises)
    dora_convert.merge(base, adapter, tmp_path / "out", undo="exact")
    assert forgotten
    assert all(name.endswith(".safetensors") for name in forgotten)
    forgotten.clear()
    mine = shutil.copytree(base, tmp_path / "mine")
    dora_convert.merge(mine, adapter, in_place=True)
    assert not forgotten
