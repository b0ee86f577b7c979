"""Run a verb in place in children that die in the middle of it, then run it again: driven by test_in_place.py.

Arguments: verb, a folder to work in, the adapter, how many deaths. Each child counts what it does to the disk and is gone
at a number drawn at random, in the middle of a write. Prints one line of JSON: for each death what was there before the
command ran again, and whether that was refused as unfinished.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import traceback
from pathlib import Path

import dora_convert
from dora_convert.errors import RefError
from dora_convert.output.shards import ShardFiles
from dora_convert.storage import journal
from dora_convert.storage import reader as blocks
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.refs import local_source
from dora_convert.undo import restore as restoring
from dora_convert.verbs.merge import pipeline as produce  # torch is imported before children are made

blocks.BLOCK_ELEMENTS, journal.BATCH_SECONDS = 1 << 10, 0.0
assert produce
assert restoring
verb, work, adapter, deaths = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])


def run(folder: Path) -> None:
    getattr(dora_convert, verb)(folder, adapter, in_place=True, workers=2)


def child(folder: Path, allowed: int, count: Path | None = None) -> int:
    """The verb in a process of its own that dies after so many operations; its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    done = [0]

    def counted(function, torn=None):
        def inner(*args, **kwargs):
            done[0] += 1
            if done[0] > allowed:
                if torn:
                    torn(*args)
                os._exit(9)
            return function(*args, **kwargs)

        return inner

    write = ShardFiles._write
    ShardFiles._write = counted(write, lambda self, d, at, data: write(self, d, at, data[: len(data) // 2]))
    for name in ("rename", "replace", "unlink", "rmdir", "open", "mkdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    os.fsync = counted(os.fsync)
    code = 1
    try:
        run(folder)
        code = 0
        if count:
            count.write_text(str(done[0]))
    except BaseException:  # noqa: BLE001 - whatever it is, it is told
        traceback.print_exc()
    os._exit(code)


def state(folder: Path) -> str:
    """Return "model" if the folder opens as a checkpoint, else "unfinished"."""
    try:
        open_checkpoint(local_source(folder))
    except RefError:
        return "unfinished"
    return "model"


shutil.copytree(work / "before", work / "whole")
assert child(work / "whole", 10**9, work / "count") == 0
total = int((work / "count").read_text())
chance, found = random.Random(6), []
for number in range(deaths):
    folder = work / f"killed{number}"
    shutil.copytree(work / "before", folder)
    at = chance.randrange(1, total) if number > 2 else total - number - 1
    code = child(folder, at)
    seen = state(folder)
    if seen == "model":
        shutil.copytree(folder, work / f"seen{number}")
    again = code
    for more in (chance.randrange(1, total), 10**9)[number % 2 :]:  # every other time killed once more meanwhile
        last = state(folder)
        again = child(folder, more) if again else 0
    found.append({"at": at, "code": code, "state": seen, "last": last, "again": again})
sys.stdout.write(json.dumps({"total": total, "deaths": found}))
