"""A merge that is killed or stopped from outside, as a user does it: the same command goes on, and no other run harms it."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
import torch

from .spawner import Process
from .toy import Base, contents, make_adapter, write_shards

SLOW = """
import sys, time
from dora_convert.storage import journal
from dora_convert.cli import main
from dora_convert.output.shards import ShardFiles

write, seen, most, pause = ShardFiles.write, [], int(sys.argv.pop(1)), float(sys.argv.pop(1))
journal.BATCH_SECONDS = 0.0

def slowly(self, *arguments):
    write(self, *arguments)
    seen.append(self)
    time.sleep(60 if len(seen) > most else pause)

ShardFiles.write = slowly
main()
"""
"""A command that pauses after each write, and after so many for ever: it cannot be done before it is killed."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base of many tensors and an adapter on it as words of a command, their merge, and how many bytes that writes."""
    root = tmp_path_factory.mktemp("pair")
    torch.manual_seed(5)
    (root / "base").mkdir()
    weights = {
        f"model.layers.{layer}.mlp.{name}.weight": torch.randn(shape).bfloat16()
        for layer in range(30)
        for name, shape in (("up_proj", (160, 80)), ("gate_proj", (160, 80)))
    }
    write_shards(root / "base", weights, 3)
    make_adapter(root / "adapter", Base(root / "base", weights), dora=True)
    words = ["merge", str(root / "base"), str(root / "adapter"), "--workers", "1"]
    done = run(words, root / "whole", "--json")
    return words, contents(root / "whole"), json.loads(done.stdout)["bytes_written"]


def run(words, out, *options):
    """A merge from its beginning to its end."""
    return Process([*words, str(out), *options], os.environ).wait()


def begin(words, out, most, pause):
    """A slow merge that has begun to write: wait until its journal has grown."""
    journal = out.with_name(out.name + ".partial") / "dora_convert/journal.jsonl"
    before = journal.stat().st_size if journal.exists() else 1000
    slow = ["-c", SLOW, str(most), str(pause), *words, str(out), "--json"]
    process, end = Process(slow, os.environ, patient=True), time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size > before):
        assert time.monotonic() < end, process.wait()
        time.sleep(0.002)
    return process


def test_killed_again_and_again(pair, tmp_path):
    """kill -9 four times in a row, wherever it strikes; then the same command goes on to the same bytes."""
    words, whole, total = pair
    out, chance = tmp_path / "out", random.Random(7)
    for _ in range(4):
        process = begin(words, out, 10, 0.01)
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    done = run(words, out, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["resumed"] is True
    assert report["bytes_written"] < total
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_while_another_waits(pair, tmp_path):
    """A second run is refused and harms nothing; Ctrl-C in the first is exit code 130, and the same command goes on."""
    words, whole, _ = pair
    out = tmp_path / "out"
    first = begin(words, out, 60, 0.05)
    first.send_signal(signal.SIGSTOP)
    second = run(words, out, "--overwrite")
    assert second.returncode == 2
    assert "Another run is writing" in second.stderr
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGCONT)
    stopped = first.wait()
    assert stopped.returncode == 130, stopped.stderr
    error = json.loads(stopped.stderr.splitlines()[-1])["error"]
    assert "rerun the same command to resume" in error["hint"]
    assert "Traceback" not in stopped.stderr
    assert not out.exists()
    assert json.loads(run(words, out, "--json").stdout)["resumed"] is True
    assert contents(out) == whole
