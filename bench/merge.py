"""Time whole processes against each other: cp, dora-convert and PEFT on a synthetic model.

    python merge.py [--size 1.24] [--rounds 5] [--peft] [--small 4500] [--only dora lora] [--folder bench/build]

Every round runs each command once, so that a slow minute of the machine hits all commands. `cp` is `cp -r` and an
fsync of each copy: the least work of a merge. The last columns are the medians of each round's ratio to `cp`. *Net*
is less the time that importing torch takes in the same round. For *cold*, the model's and the adapter's pages are
dropped from the cache before each command, those of `cp` too; torch stays in the cache.

`--small` is a model of so many experts' weights of 256 × 768. Its last column is the share of the rate, in parameters
a second and net of torch, at which the same adapter kind is merged into the usual model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
COPY = 'cp -r "$0" "$1" && sync "$1"/*'
TORCH = "import torch"
Times = dict[str, list[float]]


def run(command: list[str], out: Path) -> tuple[float, int]:
    """Run one process and return its seconds and its peak resident bytes."""
    for folder in (out, out.with_name(f"{out.name}.partial")):  # of a bench that was stopped: it would be resumed
        shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed: {message.decode()}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def commands(folder: Path, out: Path, kinds: list[str], *, peft: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of a round by name."""
    base = str(folder / "base")
    yield "cp", ["sh", "-c", COPY, base, str(out)]
    for kind in kinds:
        yield kind, [sys.executable, "-m", "dora_convert", "merge", base, str(folder / kind), str(out), "-q"]
        if peft and kind != "qv":
            yield f"peft {kind}", [sys.executable, "-c", PEFT, base, str(folder / kind), str(out)]


def warm(folder: Path) -> None:
    """Read all files into the page cache."""
    subprocess.run(["cat", *map(str, folder.glob("*/*.safetensors"))], stdout=subprocess.DEVNULL, check=True)


def chill(folder: Path) -> None:
    """Drop all files from the page cache."""
    for path in folder.glob("*/*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(chosen: argparse.Namespace, folder: Path, *, cold: bool) -> tuple[Times, dict[str, int]]:
    """Run all rounds; return the seconds and the peak bytes of each command."""
    seconds: Times = {}
    peak: dict[str, int] = {}
    for number in range(chosen.rounds):
        jobs = [(TORCH, [sys.executable, "-c", TORCH])]
        jobs += commands(folder, folder / "out", chosen.only, peft=chosen.peft and not cold)
        for name, command in jobs:
            shutil.rmtree(folder / "out", ignore_errors=True)
            chill(folder) if cold else warm(folder)
            took, held = run(command, folder / "out")
            seconds.setdefault(name, []).append(took)
            peak[name] = max(peak.get(name, 0), held)
        print(f"round {number + 1}: " + ", ".join(f"{name} {each[-1]:.2f} s" for name, each in seconds.items()))
    shutil.rmtree(folder / "out", ignore_errors=True)
    return seconds, peak


def net(seconds: Times, name: str) -> list[float]:
    """Return the seconds of each round less the import of torch."""
    return [one - spent for one, spent in zip(seconds[name], seconds[TORCH], strict=True)]


def over(one: list[float], other: list[float]) -> float:
    """Return the median of each round's ratio."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def report(title: str, seconds: Times, peak: dict[str, int]) -> None:
    print(f"\n{title:14}{'median s':>10}{'net s':>8}{'whole / cp':>12}{'net / cp':>10}{'peak MB':>9}")
    for name, each in seconds.items():
        line = f"{name:14}{statistics.median(each):10.2f}"
        if name not in ("cp", TORCH):
            own = net(seconds, name)
            line += f"{statistics.median(own):8.2f}{over(each, seconds['cp']):12.2f}{over(own, seconds['cp']):10.2f}"
            line += f"{peak[name] / 1e6:9.0f}"
        print(line)


def build(folder: Path, words: list[str]) -> Path:
    """Make a synthetic model and its adapters, unless they are there."""
    if not (folder / "qv").exists():
        subprocess.run([sys.executable, str(HERE / "synthetic.py"), str(folder), *words], check=True)
    return folder


def parameters(folder: Path) -> float:
    """Return about the number of parameters of a base in two bytes each."""
    return sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.24, help="billions of parameters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--warm-only", action="store_true")
    parser.add_argument("--small", type=int, default=0, help="experts' weights of a second model")
    parser.add_argument("--only", nargs="+", default=["dora", "lora", "qv"])
    parser.add_argument("--folder", type=Path, default=HERE / "build")
    chosen = parser.parse_args()
    folder = build(chosen.folder / f"{chosen.size:g}b", ["--size", str(chosen.size)])
    seconds, peak = measure(chosen, folder, cold=False)
    report("warm", seconds, peak)
    if not chosen.warm_only:
        report("cold", *measure(chosen, folder, cold=True))
    if chosen.small:
        experts = build(chosen.folder / f"{chosen.small}small", ["--experts", str(chosen.small)])
        times, held = measure(chosen, experts, cold=False)
        report("small tensors", times, held)
        for kind in chosen.only:
            share = over(net(seconds, kind), net(times, kind)) * parameters(experts) / parameters(folder)
            print(f"{kind:14}{share:10.0%} of the rate of large tensors")


if __name__ == "__main__":
    main()
