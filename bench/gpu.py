"""Test and time everything on a GPU, with one command on a bare machine.

    python gpu.py [--device cuda] [--wheels FOLDER] [--work FOLDER] [--out FOLDER] [--layers 16] [--rounds 3]

The machine needs Python 3.12 and torch 2.11 or newer. Packages that are missing are taken from the wheels in FOLDER,
which are unpacked and not installed; nothing is downloaded. The script runs the GPU tests, compares bytes with those
of the processor, times each stage of a block, a plain loop (read, to the device, back, write), and every verb. It
prints a table and writes it to OUT/gpu.md, fit for docs/performance.md. `--device cpu` rehearses all of it without a
card: a processor then does what a device does. The exit code is 1 if a test or a comparison fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = ("gpu", "staging", "devices", "maths")
PACKAGES = (
    "click",
    "filelock",
    "huggingface_hub",
    "jinja2",
    "msgspec",
    "rich",
    "safetensors",
    "tqdm",
    "xxhash",
    "zstandard",
)


class Table:
    """Rows of what was measured, printed as they come."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed: list[str] = []

    def section(self, title: str, *columns: str) -> None:
        """Begin a table of its own."""
        self._add("", f"### {title}", "", "| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns))

    def row(self, name: str, *values: object) -> None:
        """Add a row."""
        shown = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in values)
        self._add(f"| {name} | " + " | ".join(shown) + " |")

    def check(self, name: str, *values: object, right: bool) -> None:
        """Add a row that may fail."""
        self.row(name, *values, "yes" if right else "**NO**")
        if not right:
            self.failed.append(name)

    def _add(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)


def parse() -> argparse.Namespace:
    shared = Path("/dev/shm/dora-gpu")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--wheels", type=Path, default=HERE / "wheels")
    parser.add_argument("--work", type=Path, default=shared if shared.parent.is_dir() else HERE / "build/gpu")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or HERE / "build"))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--scale", type=int, default=1, help="divide every side of the model by this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-tests", action="store_true")
    return parser.parse_args()


def complete(wheels: Path, site: Path, device: str) -> None:
    """Make the packages importable, here and in processes started from here."""
    files = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    missing = []
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            continue
        mine = [file for file in files if file.name.lower().replace("-", "_").startswith(package)]
        for file in mine:
            zipfile.ZipFile(file).extractall(site)
        missing += [] if mine else [package]
    if missing:
        sys.exit(f"{', '.join(missing)}: not installed, and no wheel in {wheels}")
    sys.path[:0] = [str(HERE), str(HERE.parent), str(site)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[1:3], os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ |= {"HF_HUB_OFFLINE": "1"} | ({} if device.startswith("cuda") else {"DORA_CONVERT_REHEARSE": "1"})
    importlib.invalidate_caches()


def describe(table: Table, device: str) -> None:
    """Name the machine and the card."""
    import torch

    import dora_convert

    table.section("Machine", "")
    table.row(
        "versions",
        f"dora-convert {dora_convert.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}",
    )
    table.row("processors", len(os.sched_getaffinity(0)))
    if not device.startswith("cuda"):
        table.row("card", "none: a processor does what a device does")
        return
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        table.row(f"card {number}", f"{card.name}, {card.total_memory >> 30} GiB, {card.multi_processor_count} SMs")
    query = [
        "nvidia-smi",
        "--query-gpu=pcie.link.gen.max,pcie.link.width.current,driver_version",
        "--format=csv,noheader",
    ]
    if shutil.which("nvidia-smi"):
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        table.row("PCIe generation, width, driver", done.stdout.strip().replace("\n", "; "))


def run_tests(table: Table) -> None:
    """Run the tests of this path in a process of its own."""
    table.section("Tests", "result", "right")
    for name in TESTS:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", f"tests/test_{name}.py"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        if done.returncode:
            print(*lines[-60:], sep="\n")
        skipped = next((line.split(": ", 1)[-1] for line in lines if line.startswith("SKIPPED")), "")
        table.check(f"test_{name}.py", " ".join(filter(None, (lines[-1], skipped))), right=done.returncode in (0, 5))


def attempt(part: Callable[[], object], table: Table) -> None:
    """Do one part; the others still tell something if it fails."""
    try:
        part()
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        table.check(f"stopped: {type(error).__name__}", str(error)[:200], right=False)


def main() -> None:
    given = parse()
    site = given.work / "site"
    site.mkdir(parents=True, exist_ok=True)
    given.out.mkdir(parents=True, exist_ok=True)
    complete(given.wheels, site, given.device)
    table = Table()
    describe(table, given.device)
    import gpu_stages
    import gpu_verbs

    parts = [] if given.skip_tests else [lambda: run_tests(table)]
    bench = gpu_verbs.Bench(given.device, given.work, table, given.rounds)
    bench.build(given.layers, given.scale)
    parts += [
        bench.compare_bytes,
        lambda: gpu_stages.time_stages(given.device, bench.work, table, given.scale),
        lambda: gpu_stages.time_plain_loop(given.device, bench.base, bench.work, table, given.rounds),
        bench.time_merges,
        bench.time_verbs,
    ]
    for part in parts:
        attempt(part, table)
    (given.out / "gpu.md").write_text("\n".join(table.lines).strip() + "\n")
    shutil.rmtree(given.work, ignore_errors=True)
    if table.failed:
        sys.exit("failed: " + "; ".join(table.failed))


if __name__ == "__main__":
    main()
