"""Throw broken files at everything that reads headers and configs: python tests/fuzz.py --seconds 60 [--seed N] [--start I]

Each iteration takes good files, changes one of them a little, and reads them. Nothing but DoraConvertError may escape,
nothing may take long, and what we take for a safetensors file or a pickle of tensors, their own libraries do, too. A
failure prints the seed and the iteration that make it again, and the exit code is 1.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it

from fuzzing.readers import TARGETS, Read
from fuzzing.seeds import make_seeds

import dora_convert

SECONDS = 5
"""More than any file here takes."""
MEGABYTES = 200
"""So is this: what is held for one of them."""
LIMIT = 6 << 30
"""Of address space: what would take all memory is an error instead."""


def check_message(error: dora_convert.DoraConvertError) -> None:
    """Few lines, in any encoding."""
    lines = error.text().splitlines()
    assert len(lines) <= 12, "a message of many lines"
    assert max(map(len, lines)) < 700, "a message of a long line"
    json.dumps(error.to_dict(), ensure_ascii=False).encode()


class TooLongError(BaseException):
    """Not to be caught on the way, as a TimeoutError would be, which is an OSError."""


def attempt(root: Path, seed: int, iteration: int) -> str:
    """One iteration: "taken" or "refused"; whatever else escapes is a failure."""
    chance = random.Random(f"{seed}:{iteration}")
    name, change, read = chance.choice(TARGETS)
    good = (root / name).read_bytes()
    (root / name).write_bytes(change(chance, good))
    shutil.copyfile(root / name, root / "last")
    held = peak()
    try:
        return outcome(read, root)
    finally:
        (root / name).write_bytes(good)
        assert peak() < held + MEGABYTES, f"{peak() - held} MB more are held for {name}"


def outcome(read: Read, root: Path) -> str:
    """Read, in time."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(10 * SECONDS, exit=True)  # where threads go on
    try:
        read(root)
    except dora_convert.DoraConvertError as error:
        check_message(error)
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    return "taken"


def peak() -> int:
    """The most memory that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def too_long(*_: object) -> None:
    raise TooLongError(f"more than {SECONDS} seconds")


def prepare(root: Path) -> None:
    """Seeds, each of which is good before it is broken, and limits."""
    make_seeds(root)
    for target in TARGETS:
        assert outcome(target.read, root) == "taken", target.name
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))


def main() -> int:
    """Run for a while; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--start", type=int, default=0)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as folder:
        prepare(root := Path(folder))
        return run(root, chosen.seconds, chosen.seed, chosen.start)


def run(root: Path, seconds: float, seed: int, start: int) -> int:
    """Iteration after iteration; 1 if one of them has failed."""
    counts: collections.Counter[str] = collections.Counter()
    failures: set[str] = set()
    end, iteration = time.monotonic() + seconds, start
    while time.monotonic() < end:
        try:
            counts[attempt(root, seed, iteration)] += 1
        except (Exception, TooLongError) as error:  # noqa: BLE001 - which is what is looked for
            counts["failed"] += 1
            if (place := where(error)) not in failures:
                failures.add(place)
                traceback.print_exc(limit=-3)
                print(f"the file begins with {(root / 'last').read_bytes()[:1000]!r}")
                print(f"again: python tests/fuzz.py --seed {seed} --start {iteration} --seconds 1\n")
        iteration += 1
    print(f"fuzz: {iteration - start} files, {dict(counts)}, seed {seed}, {len(failures)} failures")
    return 1 if failures else 0


def where(error: BaseException) -> str:
    """Return the key that identifies a failure: the error's type, and the last line of ours in its traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "dora_convert" in frame.filename]
    return f"{type(error).__name__} {frames[-1].filename}:{frames[-1].lineno}" if frames else repr(error)


if __name__ == "__main__":
    sys.exit(main())
