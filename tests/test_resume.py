"""A run that ended anyhow is continued by the same command, to the same bytes; no other run may."""

from __future__ import annotations

import json
import os
import shutil
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.engine.workers import TensorWork
from dora_convert.errors import OutputError
from dora_convert.storage.journal import read_journal

from .spawner import Process
from .toy import contents, exact, load, make_adapter, make_base, rounded, stopped

DRIVER = """
    import os, sys, threading
    import dora_convert
    from dora_convert.storage import reader as blocks
    from dora_convert.storage import journal
    from dora_convert.storage.journal import Journal
    from dora_convert.output.shards import ShardFiles

    base, adapter, out, allowed = *sys.argv[1:4], int(sys.argv[4])
    blocks.BLOCK_ELEMENTS, journal.BATCH_SECONDS = 1 << 10, 0.0
    write, add_all, lock, count = ShardFiles._write, Journal.add_all, threading.Lock(), 0

    def adds(self, *lines):
        add_all(self, *lines)
        self._thread.idle(60.0)  # a slow disk must not lose what came before the last write

    def dies(self, descriptor, position, data):
        global count
        with lock:
            count += 1
            if count > allowed:
                write(self, descriptor, position, data[: len(data) // 2])
                os._exit(9)
        write(self, descriptor, position, data)

    ShardFiles._write, Journal.add_all = dies, adds
    report = dora_convert.merge(base, adapter, out, overwrite="--overwrite" in sys.argv, undo="norms")
    print(report.resumed, report.bytes_written)
"""


def run(base, adapter, out, allowed):
    """A merge in a process that is gone, in the middle of a write, after so many."""
    words = ["-c", textwrap.dedent(DRIVER), str(base), str(adapter), str(out), str(allowed)]
    return Process(words, os.environ).wait()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base and an adapter on it, and what their merge must be, byte for byte."""
    root = tmp_path_factory.mktemp("pair")
    base = make_base(root / "base", layers=3)
    adapter = make_adapter(root / "adapter", base, dora=True)
    done = run(base.path, adapter, root / "whole", 10**9)
    assert done.stdout.split()[0] == "False", done.stderr
    return base, adapter, contents(root / "whole"), int(done.stdout.split()[1])


def test_killed_again_and_again(tmp_path, pair):
    """Killed in the middle of writes, five times in a row: each run goes on, and the end is the same bytes."""
    base, adapter, whole, total = pair
    out = tmp_path / "out"
    for allowed in (1, 6, 12, 11, 9):
        died = run(base.path, adapter, out, allowed)
        assert died.returncode == 9, died.stderr
        assert not out.exists()
    last = run(base.path, adapter, out, 10**9)
    assert last.returncode == 0, last.stderr
    resumed, written = last.stdout.split()
    assert resumed == "True"
    assert int(written) < total
    assert contents(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def interrupted(base, adapter, out, after=3, **options):
    """A merge stopped by Ctrl-C once so many writes are through."""
    with stopped(after):
        dora_convert.merge(base.path, adapter, out, workers=1, **options)


def test_interrupted(tmp_path, base, adapter):
    """Ctrl-C keeps what is done, and gives the lock back."""
    interrupted(base, adapter, tmp_path / "out", after=4)
    assert not (tmp_path / "out").exists()
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert report.resumed
    assert report.bytes_written < sum(tensor.nbytes for tensor in base.tensors.values())
    for name, x in exact(base, adapter).items():
        assert torch.equal(load(tmp_path / "out")[name], rounded(x, torch.bfloat16))


def test_a_retrained_adapter_is_not_mixed_in(tmp_path, base, adapter):
    """Same names, same shapes, other values: the half-written output is refused, and --overwrite starts over."""
    out = tmp_path / "out"
    interrupted(base, adapter, out)
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values())).mul_(2)
    save_file(tensors, adapter / "adapter_model.safetensors")
    before = contents(tmp_path / "out.partial")
    with pytest.raises(OutputError, match="unfinished run of something else"):
        dora_convert.merge(base.path, adapter, out)
    assert contents(tmp_path / "out.partial") == before
    report = dora_convert.merge(base.path, adapter, out, overwrite=True)
    assert not report.resumed
    for name, x in exact(base, adapter).items():
        assert torch.equal(load(out)[name], rounded(x, torch.bfloat16))


@pytest.mark.parametrize("options", [{"undo": "none"}, {"compute_dtype": "float32"}, {"dtype": "float32"}])
def test_other_options_are_another_run(tmp_path, base, adapter, options):
    """Whatever changes bytes changes the key."""
    interrupted(base, adapter, tmp_path / "out")
    with pytest.raises(OutputError):
        dora_convert.merge(base.path, adapter, tmp_path / "out", **options)


def test_a_changed_base_is_another_run(tmp_path, base, adapter):
    """A base file touched since is not the same base."""
    interrupted(base, adapter, tmp_path / "out")
    os.utime(next(base.path.glob("*.safetensors")), (1, 1))
    with pytest.raises(OutputError):
        dora_convert.merge(base.path, adapter, tmp_path / "out")


def test_resources_may_change_in_between(tmp_path, base, adapter):
    """Workers, memory and the self-check are not in the key; what was not checked is checked now."""
    interrupted(base, adapter, tmp_path / "out", verify=False)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", workers=3, max_memory="1MB")
    assert report.resumed
    assert report.verified.checked > 0
    fresh = dora_convert.merge(base.path, adapter, tmp_path / "fresh")
    assert fresh.verified == report.verified
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_torn_journal_line_does_not_count(tmp_path, base, adapter):
    """A line without its end, or of garbage, is as if it were not there, and so is all behind it."""
    whole = dora_convert.merge(base.path, adapter, tmp_path / "whole")
    for number, tail in enumerate((b'{"made": "model.norm.weight"', b"\0\0\0\0\n", b"{}x\n")):
        out = tmp_path / f"out{number}"
        interrupted(base, adapter, out, after=4)
        path = out.with_name(out.name + ".partial") / "dora_convert/journal.jsonl"
        entered = len(read_journal(path).lines)
        with path.open("ab") as file:
            file.write(tail)
        assert len(read_journal(path).lines) == entered
        assert dora_convert.merge(base.path, adapter, out).verified == whole.verified
        assert contents(out) == contents(tmp_path / "whole")


def test_a_second_run_is_kept_out(tmp_path, base, adapter):
    """Two runs on one OUT at the same time: the second is refused, the first is not harmed."""
    refused = []

    def second(_done, _total):
        if not refused:
            with pytest.raises(OutputError, match="Another run is writing"):
                dora_convert.merge(base.path, adapter, tmp_path / "out")
            refused.append(True)

    dora_convert.merge(base.path, adapter, tmp_path / "out", on_progress=second)
    assert refused


def test_a_folder_of_the_users_is_not_emptied(tmp_path, base, adapter):
    """OUT.partial may exist by chance; without our marks it is left alone."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an unfinished output"):
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert (tmp_path / "out.partial/mine.txt").read_text() == "mine"


def test_killed_while_replacing(tmp_path, base, adapter):
    """OUT had been moved aside, the new one not yet named: the old one comes back, then the merge goes on."""
    out, old = tmp_path / "out", tmp_path / "out.old"
    dora_convert.merge(base.path, adapter, out)
    before = contents(out)
    (out / ".dora-convert-replaced").touch()
    out.rename(old)
    with pytest.raises(OutputError, match="exists"):
        dora_convert.merge(base.path, adapter, out)
    assert contents(out) == before
    shutil.copytree(out, old)
    (old / ".dora-convert-replaced").touch()
    dora_convert.merge(base.path, adapter, out, overwrite=True)
    assert contents(out) == before
    assert not old.exists()


def test_someone_elses_old_folder_stays(tmp_path, base, adapter):
    """OUT.old that we did not make is not deleted."""
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "notes").touch()
    with pytest.raises(OutputError, match=r"out\.old exists"):
        dora_convert.merge(base.path, adapter, tmp_path / "out", overwrite=True)


def test_the_journal_is_not_published(tmp_path, base, adapter):
    """A published output holds neither journal nor spool nor lock."""
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    names = {name.rpartition("/")[2] for name in contents(tmp_path / "out")}
    assert not names & {"journal.jsonl", "undo.spool", ".lock"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_parent(tmp_path, base, adapter):
    """A parent folder that cannot be written is an error in words."""
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    with pytest.raises(OutputError, match="cannot be written"):
        dora_convert.merge(base.path, adapter, place / "out")


def test_disk_full(tmp_path, base, adapter, monkeypatch):
    """Space is counted before anything is written; when it runs out all the same, the error says what to do."""
    from dora_convert.output import shards as writer

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="has 1 kB free; the output needs"):
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.ShardFiles, "write", full)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "rerun the same command to resume" in caught.value.hint
    monkeypatch.undo()
    monkeypatch.setattr(writer, "allocate", full)
    with pytest.raises(OutputError, match="No space left on device"):
        dora_convert.merge(base.path, adapter, tmp_path / "out2")
    assert not list(tmp_path.glob("out2*"))


def test_journal_is_json_lines(tmp_path, base, adapter):
    """The key first, then one line for each finished copy or tensor."""
    interrupted(base, adapter, tmp_path / "out", after=4)
    lines = (tmp_path / "out.partial/dora_convert/journal.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {"plan", "adapters", "base", "versions", "device", "compute"} == records[0].keys()
    assert all(record.keys() & {"copied", "made"} for record in records[1:])


def test_many_small_tensors_are_grouped(tmp_path, monkeypatch):
    """A task that writes several tensors is resumed, and gives the bytes of tasks of one tensor each."""
    base = make_base(tmp_path / "base", layers=16)
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, tmp_path / "single", workers=4)
    sizes, do = [], TensorWork.do

    def counted(self, task, buffers):
        sizes.append(len(task.names))
        if len(sizes) == 9:
            raise KeyboardInterrupt
        return do(self, task, buffers)

    monkeypatch.setattr(TensorWork, "do", counted)
    with pytest.raises(KeyboardInterrupt):
        dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1)
    assert report.resumed
    assert max(sizes) == 48 // 16
    assert contents(tmp_path / "out") == contents(tmp_path / "single")
