"""An output that is begun before torch is there: the same bytes, whatever ends the run, and nothing left of a run that is refused."""

from __future__ import annotations

import os
import shutil
import textwrap
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import NumericalError, OutputError, UsageError
from dora_convert.output import early, shards
from dora_convert.plan import stored_numbers
from dora_convert.storage.journal import read_journal
from dora_convert.verbs import merge as verb

from .spawner import Process
from .test_silent_values import normalised
from .toy import contents, make_adapter, make_base, stopped


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base and an adapter on it, and their merge, which was not begun early."""
    root = tmp_path_factory.mktemp("pair")
    base = make_base(root / "base", layers=3)
    adapter = make_adapter(root / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, root / "whole")
    return base, adapter, contents(root / "whole")


@pytest.fixture
def starts(monkeypatch):
    """Begin each output early, and let the early thread do all that it can; returns the head starts."""
    monkeypatch.setattr(verb, "EARLY_BYTES", 0)
    monkeypatch.setattr(early, "LEAST_HASHED", 1000)
    monkeypatch.setattr(early, "SYNCED_BYTES", 1)
    monkeypatch.setattr(early.HeadStart, "stop", lambda self: self._thread.join())
    begun, start = [], early.HeadStart.__init__

    def starts(self, *arguments):
        begun.append(self)
        start(self, *arguments)

    monkeypatch.setattr(early.HeadStart, "__init__", starts)
    return begun


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"undo": "exact", "workers": 1}])
def test_same_bytes(tmp_path, pair, starts, options, monkeypatch):
    """Copies and hashes are those of the run; the run copies and hashes only what is left."""
    base, adapter, _ = pair
    copies, copy = [], shards.ShardFiles.copy
    monkeypatch.setattr(shards.ShardFiles, "copy", lambda self, *words: (copies.append(words[0]), copy(self, *words)))
    begun = dora_convert.merge(base.path, adapter, tmp_path / "early", **options)
    copied = {line.copied for line in starts[0].finish() if line.copied}
    assert copied == {each[2:] for each in copies}
    assert len(copied) == len(copies)
    assert any(line.made for line in starts[0].finish())
    monkeypatch.setattr(verb, "EARLY_BYTES", 1 << 60)
    plain = dora_convert.merge(base.path, adapter, tmp_path / "plain", **options)
    assert contents(tmp_path / "early") == contents(tmp_path / "plain")
    assert not begun.resumed
    assert len(starts) == 1
    assert plain.bytes_written == begun.bytes_written


KILLED = """
    import os, sys
    from dora_convert.cli import main
    from dora_convert.output import early, shards
    from dora_convert.verbs import merge

    seen, most = [], int(sys.argv.pop(1))

    def counted(function):
        def counts(*arguments, **named):
            if len(seen) == most:
                os._exit(9)
            seen.append(function.__name__)
            return function(*arguments, **named)
        return counts

    merge.EARLY_BYTES, early.LEAST_HASHED, early.SYNCED_BYTES = 0, 1000, 1
    early.HeadStart.stop = lambda self: self._thread.join()
    shards.ShardFiles._create = counted(shards.ShardFiles._create)
    shards.ShardFiles.copy = counted(shards.ShardFiles.copy)
    shards.allocate = counted(shards.allocate)
    shards.ShardFiles.sync = counted(shards.ShardFiles.sync)
    early.HeadStart._hash = counted(early.HeadStart._hash)
    early.HeadStart.finish = counted(early.HeadStart.finish)
    shards.ShardFiles.write = counted(shards.ShardFiles.write)
    main()
"""


def test_killed_at_each_step(tmp_path, pair):
    """Killed before any step of the early part, the same command begins again, or resumes, to the same bytes."""
    base, adapter, whole = pair
    steps, out = 0, tmp_path / "out"
    while True:
        words = ["-c", textwrap.dedent(KILLED), str(steps), "merge", str(base.path), str(adapter), str(out), "--json"]
        died = Process(words, os.environ).wait()
        if died.returncode == 0 or steps > 40:
            break
        assert died.returncode == 9, died.stderr
        assert not out.exists()
        steps += 1
        if steps % 4:  # else the next run begins where this one died
            shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    assert steps > 20
    assert died.returncode in (0, 9)
    if died.returncode == 9:
        dora_convert.merge(base.path, adapter, out)
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("owner", "name"), [(shards, "allocate"), (shards.ShardFiles, "copy")])
def test_disk_full(tmp_path, pair, starts, monkeypatch, owner, name):
    """A disk that is full for the early thread is an error as ever, and nothing is left."""
    base, adapter, _ = pair
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OutputError, match="No space left on device"):
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert starts
    assert not list(tmp_path.glob("out*"))


def test_disk_full_later(tmp_path, pair, starts, monkeypatch):
    """A slow allocation that fails while tensors are written is the run's error, and the run can be resumed."""
    base, adapter, whole = pair
    wait = early.HeadStart.finish

    def finish(self):
        done = wait(self)
        self.shards._allocation.idle(10)
        self.shards._allocation._error = OSError(28, "No space left on device")
        return done

    monkeypatch.setattr(early.HeadStart, "finish", finish)
    monkeypatch.setattr(shards.ShardFiles, "check", lambda *_: None)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "rerun the same command to resume" in caught.value.hint
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert dora_convert.merge(base.path, adapter, tmp_path / "out").resumed
    assert contents(tmp_path / "out") == whole


def test_without_the_space(tmp_path, pair, starts, monkeypatch):
    """A disk without the space gets nothing early."""
    base, adapter, _ = pair
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="the output needs"):
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert not starts
    assert not list(tmp_path.glob("out*"))


def test_refused_later(tmp_path, pair, starts):
    """What only torch can refuse leaves nothing of an output that was begun early."""
    base, adapter, _ = pair
    with pytest.raises(UsageError, match="does not hold one block"):
        dora_convert.merge(base.path, adapter, tmp_path / "out", max_memory="1KB")
    damaged = shutil.copytree(adapter, tmp_path / "damaged")
    tensors = load_file(damaged / "adapter_model.safetensors")
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, damaged / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match="is damaged"):
        dora_convert.merge(base.path, damaged, tmp_path / "out")
    assert len(starts) == 2
    assert not list(tmp_path.glob("out*"))


def test_unfinished_runs_are_not_touched(tmp_path, pair, starts, monkeypatch):
    """A run goes on from its journal; with another torch it is refused, and it stays."""
    base, adapter, whole = pair
    with stopped():
        dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1)
    lines = read_journal(tmp_path / "out.partial/dora_convert/journal.jsonl").lines
    assert {tuple(line["copied"]) for line in lines if line.get("copied")}
    left = contents(tmp_path / "out.partial")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.1")
        with pytest.raises(OutputError, match="unfinished run of something else"):
            dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert contents(tmp_path / "out.partial") == left
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert report.resumed
    assert len(starts) == 1
    assert contents(tmp_path / "out") == whole


def test_nothing_early(tmp_path, pair, starts):
    """A rehearsal writes nothing, and a base that is changed in place has no shards to begin."""
    base, adapter, _ = pair
    dora_convert.merge(base.path, adapter, tmp_path / "out", dry_run=True)
    assert not list(tmp_path.iterdir())
    mine = shutil.copytree(base.path, tmp_path / "mine")
    dora_convert.merge(mine, adapter, in_place=True)
    assert not starts


def test_an_answer_of_torch_changes_the_plan(tmp_path, starts, monkeypatch):
    """A question about the adapter is put off until torch is there; its answer counts, and the early copies stay."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    normalised(base, adapter)
    told = dora_convert.merge(base.path, adapter, tmp_path / "plain").warnings
    assert any("divided by their norms" in line for line in told)
    monkeypatch.setattr(stored_numbers, "sys", SimpleNamespace(modules={}))
    answered = []
    put_off = verb.make_request_plan

    def plans(*arguments, later=None, **named):
        plan = put_off(*arguments, later=later, **named)
        answered.append(len(later or ()))
        monkeypatch.setattr(stored_numbers, "sys", SimpleNamespace(modules={"torch": torch}))
        return plan

    monkeypatch.setattr(verb, "make_request_plan", plans)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert answered == [1, 0]
    assert report.warnings == told
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
