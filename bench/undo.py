"""Measure the cost of an undo record: its size, the merge's time, and the elements that unmerging loses.

    python bench/undo.py BASE ADAPTER [--repeat 5]

Each line is a median over whole processes. "lost" counts the elements that differ from the base's after
unmerging.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

from dora_convert.settings import format_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    chosen = parser.parse_args()
    whole = sum(path.stat().st_size for path in chosen.base.glob("*.safetensors"))
    with tempfile.TemporaryDirectory() as folder:
        kinds = ("none", "norms", "exact")
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(chosen.repeat):  # in turns, so that a slow minute hits all kinds
            for kind in kinds:
                out = Path(folder) / kind
                seconds[kind].append(timed("merge", chosen.base, chosen.adapter, out, "--undo", kind))
        plain = statistics.median(seconds["none"])
        for kind in kinds:
            record = Path(folder) / kind / "dora_convert/undo.safetensors"
            size = record.stat().st_size if record.exists() else 0
            median = statistics.median(seconds[kind])
            line = f"merge --undo {kind:6} {median:6.2f} s  {median / plain:4.2f} x"
            line += f"  record {format_size(size):>8}"
            print(f"{line}  {size / whole:.2%} of the base")
        for kind in kinds[1:]:
            again = Path(folder) / "again"
            took = timed("unmerge", Path(folder) / kind, chosen.adapter, again)
            print(f"unmerge, {kind:6}     {took:6.2f} s  lost {lost(chosen.base, again):,} elements")


def timed(verb: str, *words: object) -> float:
    """Return the seconds of one command, start and end of the process included."""
    command = [sys.executable, "-m", "dora_convert", verb, *map(str, words), "--overwrite", "--quiet"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def lost(base: Path, again: Path) -> int:
    """Return the number of elements whose bits differ."""
    total = 0
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as want, safe_open(again / path.name, "pt") as got:
            for name in want.keys():  # noqa: SIM118 - not a dict
                one, other = want.get_tensor(name).flatten(), got.get_tensor(name).flatten()
                size = one.element_size()
                differ = one.view(torch.uint8).view(-1, size) != other.view(torch.uint8).view(-1, size)
                total += int(differ.any(dim=1).sum())
    return total


if __name__ == "__main__":
    main()
