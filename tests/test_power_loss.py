"""Killed or without power at any moment: the same command finishes the same bytes, and OUT is never anything else.

`power_loss.c` writes down what the command does to the disk. From that log, the disk is made as it may be found
after a power loss at any moment: what was not synced is there, or not, or in part.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

import dora_convert
from dora_convert.errors import DoraConvertError

from .toy import contents, make_adapter, make_base

SECTOR = 512

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler"
)


@dataclasses.dataclass
class File:
    """The bytes that a program sees in a file, and the bytes that are surely on the disk."""

    now: bytearray
    safe: bytes = b""
    syncs: int = 0


@dataclasses.dataclass
class Folder:
    """The same for a folder: inode numbers by name."""

    now: dict[str, int]
    safe: dict[str, int] = dataclasses.field(default_factory=dict)


class Disk:
    """A folder's files while a log of operations is played back. Syncs of files named `unsynced` do nothing."""

    def __init__(self, root: Path, unsynced: str | None = None) -> None:
        self.nodes: dict[int, File | Folder] = {}
        self.unsynced = unsynced
        self.names: dict[int, str] = {}
        self.root = self._read(root)

    def _read(self, path: Path) -> int:
        number = path.stat().st_ino
        if path.is_dir():
            found = {entry.name: self._read(entry) for entry in path.iterdir()}
            self.nodes[number] = Folder(found, dict(found))
        else:
            self.nodes[number] = File(bytearray(path.read_bytes()), path.read_bytes())
        return number

    def play(self, verb: str, numbers: list[int], names: list[str], data: bytes) -> None:
        """One operation."""
        node = self.nodes[numbers[0]]
        match verb:
            case "write":
                node.now.extend(bytes(max(0, numbers[1] + len(data) - len(node.now))))
                node.now[numbers[1] : numbers[1] + len(data)] = data
            case "extend":
                node.now.extend(bytes(max(0, numbers[1] - len(node.now))))
            case "truncate":
                node.now[:] = node.now[: numbers[1]].ljust(numbers[1], b"\0")
            case "file" | "folder":
                node.now[names[0]] = numbers[1]
                self.names[numbers[1]] = names[0]
                self.nodes[numbers[1]] = File(bytearray()) if verb == "file" else Folder({})
            case "unlink":
                del node.now[names[0]]
            case "rename":
                self.nodes[numbers[1]].now[names[1]] = node.now.pop(names[0])
            case "sync":
                self._sync(node, self.names.get(numbers[0], ""))

    def _sync(self, node: File | Folder, name: str) -> None:
        if isinstance(node, Folder):
            node.safe = dict(node.now)
        else:  # the first sync of a file is that of its head
            node.syncs += 1
            if node.syncs == 1 or not (self.unsynced and name.endswith(self.unsynced)):
                node.safe = bytes(node.now)

    def found(self, loss, number: int | None = None, prefix: str = "") -> dict[str, bytes | None]:
        """Files and, as None, folders by their paths, as they are found after a loss."""
        node = self.nodes[self.root if number is None else number]
        if isinstance(node, File):
            return {prefix: loss(node, prefix)}
        below = {prefix: None} if prefix else {}
        for name, child in loss(node, prefix).items():
            below |= self.found(loss, child, f"{prefix}/{name}" if prefix else name)
        return below


def nothing_lost(node, _path):
    """Killed, and the power stays on."""
    return node.now if isinstance(node, Folder) else bytes(node.now)


def all_unsynced_lost(node, _path):
    """Nothing reached the disk that was not told to: neither bytes nor sizes nor names."""
    return node.safe


def bytes_lost(node, _path):
    """Names and sizes reached the disk, bytes did not: what file systems with delayed allocation do."""
    return node.now if isinstance(node, Folder) else node.safe.ljust(len(node.now), b"\0")[: len(node.now)]


def all_below_lost(node, path):
    """Folders beside OUT have their new names, and nothing else reached the disk."""
    return node.safe if path else node.now


def some_lost(seed: int):
    """Any folder may be old or new, any file's size, and any of its sectors."""
    chance = random.Random(seed)

    def loss(node, _path):
        if isinstance(node, Folder):
            return chance.choice((node.safe, node.now))
        found = bytearray(chance.choice((len(node.safe), len(node.now))))
        for start in range(0, len(found), SECTOR):
            end = min(start + SECTOR, len(found))
            found[start:end] = chance.choice((node.safe, bytes(node.now)))[start:end].ljust(end - start, b"\0")
        return bytes(found)

    return loss


LOSSES = (nothing_lost, all_unsynced_lost, bytes_lost, all_below_lost, some_lost)


def read_log(path: Path) -> list[tuple[str, list[int], list[str], bytes]]:
    """The operations that power_loss.c wrote down."""
    raw, log, at = path.read_bytes(), [], 0
    while at < len(raw):
        verb, *words = raw[at : (end := raw.index(b"\n", at))].decode().split()
        at = end + 1
        if verb == "create":
            verb = words.pop(2)
        numbers = [int(word) for word in words]
        lengths = numbers[{"write": 2, "file": 2, "folder": 2, "unlink": 1, "rename": 2}.get(verb, len(numbers)) :]
        pieces = [raw[at + sum(lengths[:n]) : at + sum(lengths[: n + 1])] for n in range(len(lengths))]
        at += sum(lengths)
        names = [] if verb == "write" else [piece.decode() for piece in pieces]
        log.append((verb, numbers, names, pieces[0] if verb == "write" else b""))
    return log


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The compiled power_loss.c."""
    path = tmp_path_factory.mktemp("shim") / "power_loss.so"
    source = Path(__file__).with_name("power_loss.c")
    done = subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", path, source, "-ldl", "-pthread"], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip(f"power_loss.c does not compile here: {done.stderr.decode()[-500:]}")
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base, an adapter on it, and their merge."""
    root = tmp_path_factory.mktemp("pair")
    base = make_base(root / "base", layers=3)
    adapter = make_adapter(root / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, root / "whole")
    return base.path, adapter, contents(root / "whole")


COMMAND = """
from dora_convert.cli import main
from dora_convert.output import shards

shards.LEAST_UNCACHED, shards.PAGE = 4096, 1024
main()
"""
"""The command, which writes most of these small tensors as it does large ones: in whole pages, past the page cache."""


def merge(shim, pair, out, *words, **limits):
    """The command under the shim, and what it did below the parent of OUT."""
    log = out.parent.with_suffix(".log")
    settings = {f"POWER_LOSS_{name}": str(value) for name, value in limits.items()}
    settings |= {"LD_PRELOAD": str(shim), "POWER_LOSS_ROOT": str(out.parent), "POWER_LOSS_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "merge", *pair[:2], out, "--json", "--workers", "2", *words],
        check=False, capture_output=True, text=True, env=os.environ | settings,
    )  # fmt: skip
    return done, read_log(log)


def record(shim, pair, root, *words):
    """A whole merge to root/out: the disk before it, and the log."""
    disk = Disk(root)
    before = copy.deepcopy(disk)
    done, log = merge(shim, pair, root / "out", *words, DELAY=30)
    assert done.returncode == 0, done.stderr
    for operation in log:
        disk.play(*operation)
    seen = {path: data for path, data in disk.found(nothing_lost).items() if data is not None}
    assert seen == contents(root), "the shim does not see everything"
    assert {path: data for path, data in disk.found(all_unsynced_lost).items() if path in seen} == seen
    shutil.rmtree(root)
    return before, log


def moments(disk, log, losses=LOSSES):
    """Every state that the disk may be found in, once: after which operation, after which loss, and what is there."""
    seen = set()
    for moment, operation in enumerate(log):
        disk.play(*operation)
        for loss in losses:
            found = disk.found(some_lost(moment) if loss is some_lost else loss)
            if (state := frozenset(found.items())) not in seen:
                seen.add(state)
                yield f"after {moment}, {operation[:3]}, {loss.__name__}", found


def lay(found, root):
    """Put files where a loss has left them."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, data in found.items():
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def entered(found):
    """True if a journal that a loss has left has a whole line after its key: then the same command must go on."""
    journals = [data for path, data in found.items() if str(path).endswith(".partial/dora_convert/journal.jsonl")]
    lines = journals[0].splitlines(keepends=True) if journals else ()
    return len([*takewhile(is_whole, lines)]) > 1


def is_whole(line):
    """True if no loss has torn a line of a journal, or left other bytes."""
    try:
        return line.endswith(b"\n") and bool(json.loads(line))
    except ValueError:
        return False


class WrongBytesError(Exception):
    """OUT is there and is not what an undisturbed merge writes: which files."""


def finish(found, root, pair, **options):
    """The same merge where a loss has left files: its report, or None where OUT is there. OUT is whole then."""
    base, adapter, whole = pair
    lay(found, root)
    report = None
    if options or not (root / "out").exists():
        report = dora_convert.merge(base, adapter, root / "out", **options)
    if (there := contents(root / "out")) != whole:  # no assert: pytest would show megabytes of differences
        raise WrongBytesError(sorted(name for name, _ in there.items() ^ whole.items()))
    assert [path.name for path in root.iterdir()] == ["out"]
    assert report is None or report.resumed == entered(found), "it goes on from what the journal holds, and only then"
    return report


def finish_all(disk, log, root, pair, losses=LOSSES, **options):
    """Finish every state of a recording: how many there were, how many went on, and how many went wrong, and when."""
    tried, resumed, wrong = 0, 0, []
    for when, found in moments(disk, log, losses):
        tried += 1
        try:
            report = finish(found, root, pair, **options)
            resumed += bool(report and report.resumed)
        except (WrongBytesError, AssertionError, DoraConvertError) as error:
            wrong.append((when, repr(error)[:200]))
    return tried, resumed, wrong


@pytest.fixture(scope="module")
def recording(shim, pair, tmp_path_factory):
    """The disk before a merge, and the log of it."""
    return record(shim, pair, tmp_path_factory.mktemp("recording"))


def test_every_moment(recording, pair, tmp_path):
    """After each operation, with each kind of loss: OUT is whole or not there, and the same command finishes it."""
    disk, log = copy.deepcopy(recording)
    tried, resumed, wrong = finish_all(disk, log, tmp_path / "root", pair)
    assert not wrong
    assert tried > 100
    assert resumed > 5  # a slow disk has entered little before the end
    _, resumed, _ = finish_all(*copy.deepcopy(recording), tmp_path / "root", pair, [all_unsynced_lost])
    assert resumed > 5


def test_it_notices_when_bytes_are_not_synced_before_the_journal_speaks_of_them(recording, pair, tmp_path):
    """Without the journal's syncs of weights, some states end in wrong bytes; without those of itself, none goes on."""
    disk, log = copy.deepcopy(recording)
    disk.unsynced = ".safetensors"
    _, _, wrong = finish_all(disk, log, tmp_path / "root", pair, [all_unsynced_lost, bytes_lost])
    assert wrong
    disk, log = copy.deepcopy(recording)
    disk.unsynced = "journal.jsonl"
    _, resumed, wrong = finish_all(disk, log, tmp_path / "root", pair, [all_unsynced_lost])
    assert (resumed, wrong) == (0, [])


def test_every_moment_of_a_run_that_goes_on(recording, shim, pair, tmp_path):
    """The run after a loss may meet the next one."""
    disk, log = copy.deepcopy(recording)
    entries = [n for n, (verb, _, _, data) in enumerate(log) if verb == "write" and data.startswith(b'{"made"')]
    states = list(moments(disk, log[: entries[0] + 2], [all_unsynced_lost]))
    lay(states[-1][1], root := tmp_path / "root")
    tried, resumed, wrong = finish_all(*record(shim, pair, root), root, pair)
    assert not wrong
    assert tried > resumed > 0


def test_every_moment_of_replacing(shim, pair, tmp_path):
    """--overwrite: OUT is the old one, the new one, or mended by the same command."""
    (root := tmp_path / "root").mkdir()
    older = make_base(tmp_path / "older", layers=1)
    dora_convert.merge(older.path, make_adapter(tmp_path / "of-older", older, dora=False), root / "out")
    _, _, wrong = finish_all(*record(shim, pair, root, "--overwrite"), root, pair, overwrite=True)
    # between the last two operations OUT.old is empty, and no one knows whose it is
    assert all("out.old exists" in error for _, error in wrong)
    assert len(wrong) <= 2


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_killed_by_the_shim(recording, shim, pair, tmp_path, share):
    """The command that dies where it stands, and the power with it; started again, it goes on to the same bytes."""
    (root := tmp_path / "root").mkdir()
    disk = Disk(root)
    done, log = merge(shim, pair, root / "out", DELAY=30, AT=int(share * len(recording[1])))
    assert done.returncode == -signal.SIGKILL
    for operation in log:
        disk.play(*operation)
    lay(disk.found(all_unsynced_lost), root)
    assert not (root / "out").exists()
    kept = entered(contents(root))
    done, _ = merge(shim, pair, root / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] is kept  # a slow disk may have entered nothing yet
    assert contents(root / "out") == pair[2]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_disk_full(recording, shim, pair, tmp_path, share):
    """No space from some moment on: exit code 2, a message that says so, nothing published; what is done counts."""
    (root := tmp_path / "root").mkdir()
    done, _ = merge(shim, pair, root / "out", DELAY=30, FULL=int(share * len(recording[1])))
    assert done.returncode == 2
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert "No space left on device" in error["message"]
    assert "this is a bug" not in done.stderr
    assert not (root / "out").exists()
    kept = (root / "out.partial").exists()
    assert kept == ("the same command to resume" in (error["hint"] or ""))
    done_before = entered(contents(root))  # how much that is, depends on the disk
    assert kept or not done_before
    report = dora_convert.merge(*pair[:2], root / "out")
    assert report.resumed == done_before
    assert contents(root / "out") == pair[2]
