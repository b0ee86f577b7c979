"""Time a merge of three DoRAs by a method against a merge of one: whole processes, seconds and peak memory.

    python methods.py [--layers 4] [--rounds 3] [--methods ties chain] [--folder bench/build-methods]

Every round runs each command once. Compare the medians of the ratios. 16 layers are 1.24 B parameters.
The time that importing torch takes is measured, too, and `net` is without it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from merge import run

HERE = Path(__file__).parent
DENSITY = {"ties": ["0.5"], "magnitude-prune": ["0.5"], "dare": ["0.5"], "dare-ties": ["0.5"], "della": ["0.5"]}


def commands(folder: Path, methods: list[str], more: list[str]) -> dict[str, list[str]]:
    """Return the commands by name: `single` first, then each method."""
    merge = [sys.executable, "-m", "dora_convert", "merge", str(folder / "base")]
    adapters, end = [str(folder / f"dora{k}") for k in range(3)], [str(folder / "out"), "-q", *more]
    found = {"import torch": [sys.executable, "-c", "import torch"], "single": [*merge, adapters[0], *end]}
    for method in methods:
        density = [word for value in DENSITY.get(method, ()) for word in ("--density", value)]
        found[method] = [*merge, *adapters, *end, "--method", method, *density]
    return found


def prepare(folder: Path, layers: int) -> None:
    """Write the base and three DoRAs, unless they are there."""
    if not (folder / "dora2" / "adapter_config.json").exists():
        subprocess.run([sys.executable, __file__, "--write", str(layers), "--folder", str(folder)], check=True)
    files = list((folder / "base").glob("*.safetensors"))
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)  # into the page cache


def write(folder: Path, layers: int) -> None:
    """Write the base and three DoRAs; in a process of its own, or its memory counts as that of the merges."""
    import torch
    from synthetic import VOCABULARY, shapes, write_adapter, write_base

    torch.manual_seed(0)
    todo = shapes(layers, VOCABULARY, 0)
    linear = {name: shape for name, shape in todo.items() if name.endswith("_proj.weight")}
    write_base(folder / "base", todo, max(1, layers // 3))
    for number in range(3):
        write_adapter(folder / f"dora{number}", linear, 16, dora=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["ties"])
    parser.add_argument("--options", nargs="*", default=[], help="such as workers=1, for every command")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--write", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    folder = chosen.folder or HERE / "build" / f"methods-{chosen.layers}"
    if chosen.write:
        write(folder, chosen.write)
        return
    prepare(folder, chosen.layers)
    more = [f"--{option}" for option in chosen.options]
    seconds: dict[str, list[float]] = {}
    peak: dict[str, int] = {}
    for number in range(chosen.rounds):
        for name, command in commands(folder, chosen.methods, more).items():
            took, held = run(command, folder / "out")
            seconds.setdefault(name, []).append(took)
            peak[name] = max(peak.get(name, 0), held)
        print(f"round {number + 1}: " + ", ".join(f"{name} {each[-1]:.2f} s" for name, each in seconds.items()))
    shutil.rmtree(folder / "out")
    report(seconds, peak)


def report(seconds: dict[str, list[float]], peak: dict[str, int]) -> None:
    """Print the median of each command, its ratio to a single merge, and its memory."""
    torch_seconds = seconds.pop("import torch")
    net = {
        name: [one - spent for one, spent in zip(each, torch_seconds, strict=True)] for name, each in seconds.items()
    }
    print(f"\n{'':16}{'median s':>10}{'/ single':>10}{'net / net':>11}{'peak MB':>9}")
    for name, each in seconds.items():
        ratio = statistics.median(one / single for one, single in zip(each, seconds["single"], strict=True))
        net_ratio = statistics.median(one / single for one, single in zip(net[name], net["single"], strict=True))
        print(f"{name:16}{statistics.median(each):10.2f}{ratio:10.2f}{net_ratio:11.2f}{peak[name] / 1e6:9.0f}")


if __name__ == "__main__":
    main()
