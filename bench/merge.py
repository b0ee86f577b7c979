"""Time whole processes against each other: cp, dora-convert and PEFT on a model of 1.24 B parameters.

    python merge.py [--rounds 5] [--skip-peft] [--folder bench/build]

Every round runs each command once, so that a slow minute of the machine hits all commands. Compare the
medians of the ratios. `cp` is `cp -r` and an fsync of each copy: the least work of a merge. The script also
measures the time that importing torch takes, and subtracts this time in the column `net`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
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


def run(command: list[str], out: Path) -> tuple[float, int]:
    """Run one process and return its seconds and its peak resident bytes."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed: {message.decode()}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def commands(folder: Path, out: Path, *, peft: bool) -> dict[str, list[str]]:
    base = str(folder / "base")
    found = {"import torch": [sys.executable, "-c", "import torch"]}
    for kind in ("dora", "lora", "qv"):
        found[kind] = [sys.executable, "-m", "dora_convert", "merge", base, str(folder / kind), str(out), "-q"]
    if peft:
        for kind in ("dora", "lora"):
            found[f"peft {kind}"] = [sys.executable, "-c", PEFT, base, str(folder / kind), str(out)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-peft", action="store_true")
    parser.add_argument("--folder", type=Path, default=HERE / "build")
    chosen = parser.parse_args()
    if not (chosen.folder / "qv").exists():
        subprocess.run([sys.executable, str(HERE / "synthetic.py"), str(chosen.folder)], check=True)
    out = chosen.folder / "out"
    base = chosen.folder / "base"
    subprocess.run(["cat", *base.glob("*.safetensors")], stdout=subprocess.DEVNULL, check=True)  # into the page cache
    seconds: dict[str, list[float]] = {}
    peak: dict[str, int] = {}
    for number in range(chosen.rounds):
        copied, _ = run(["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(base), str(out)], out)
        seconds.setdefault("cp", []).append(copied)
        for name, command in commands(chosen.folder, out, peft=not chosen.skip_peft).items():
            took, held = run(command, out)
            seconds.setdefault(name, []).append(took)
            peak[name] = max(peak.get(name, 0), held)
        print(f"round {number + 1}: " + ", ".join(f"{name} {each[-1]:.2f} s" for name, each in seconds.items()))
    shutil.rmtree(out)
    report(seconds, peak)


def report(seconds: dict[str, list[float]], peak: dict[str, int]) -> None:
    print(f"\n{'':14}{'median s':>10}{'net s':>8}{'net / cp':>10}{'peak MB':>9}")
    for name, each in seconds.items():
        net = [one - spent for one, spent in zip(each, seconds["import torch"], strict=True)]
        ratio = statistics.median(one / copied for one, copied in zip(net, seconds["cp"], strict=True))
        ours = name not in ("cp", "import torch")
        print(
            f"{name:14}{statistics.median(each):10.2f}"
            + (f"{statistics.median(net):8.2f}{ratio:10.2f}{peak[name] / 1e6:9.0f}" if ours else "")
        )


if __name__ == "__main__":
    main()
