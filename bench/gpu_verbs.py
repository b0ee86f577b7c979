"""Compare a device's bytes with a processor's, and time every verb on both."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import synthetic
import torch
from safetensors import safe_open

import dora_convert
from dora_convert.engine import run as engine_run
from dora_convert.engine.precision import ComputeSpec, choose

ALLOWED = 1e-6
"""The share of elements that a device may round to the neighbour: both results are within the bound of `verify`."""
FEW_LAYERS = 2
WORKERS = (1, 2, 4, 8, 16)


def scale_model(by: int) -> None:
    """Divide every side of the synthetic model."""
    for name in ("HIDDEN", "INTERMEDIATE", "KEY_VALUE", "VOCABULARY"):
        setattr(synthetic, name, getattr(synthetic, name) // by)
    synthetic.LINEAR = {name: (rows // by, columns // by) for name, (rows, columns) in synthetic.LINEAR.items()}


@contextmanager
def staged() -> Iterator[None]:
    """Let a processor do as a device does."""
    kept = engine_run.choose

    def stage(device: str, compute_dtype: str) -> ComputeSpec:
        spec = choose(device, compute_dtype)
        return ComputeSpec(spec.device, spec.compute, spec.reason, spec.others, stages=True)

    engine_run.choose = stage
    try:
        yield
    finally:
        engine_run.choose = kept


class Bench:
    """One synthetic model, a DoRA and a LoRA for it, and the same with a few layers."""

    def __init__(self, device: str, work: Path, table: Any, rounds: int) -> None:
        self.device, self.work, self.table, self.rounds = device, work, table, rounds
        self.title = "cpu as a device" if device == "cpu" else device
        self.base, self.few = work / "model/base", work / "few"

    def build(self, layers: int, scale: int) -> None:
        """Write the models."""
        scale_model(scale)
        torch.manual_seed(0)
        for folder, count in ((self.base.parent, layers), (self.few, min(layers, FEW_LAYERS))):
            todo = synthetic.shapes(count, synthetic.VOCABULARY, experts=0)
            linear = {name: shape for name, shape in todo.items() if name.endswith("_proj.weight")}
            synthetic.write_base(folder / "base", todo, 5 if folder != self.few else 1)
            for kind in ("dora", "lora"):
                synthetic.write_adapter(folder / kind, linear, 16, dora=kind == "dora")

    def on(self, device: str, call: Callable[..., Any], *paths: Path, **options: Any) -> Any:
        """Call a verb on a device."""
        if device == "cpu" and self.device == "cpu" and options.pop("as_device", True):
            with staged():
                return call(*paths, device=device, **options)
        options.pop("as_device", None)
        return call(*paths, device=device, **options)

    def merge(self, device: str, adapter: str, name: str, **options: Any) -> tuple[float, Any, Path]:
        """Merge into a new folder; return the seconds, the report and the folder."""
        out = self.work / name
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        report = self.on(device, dora_convert.merge, self.base, self.base.parent / adapter, out, **options)
        return time.perf_counter() - started, report, out

    def compare_bytes(self) -> None:
        """Compare whole outputs: device with processor, and one worker with four."""
        self.table.section("Bytes", "elements", "differ", "at most, ulp", "right")
        for adapter in ("dora", "lora"):
            _, _, here = self.merge("cpu", adapter, "here", as_device=False)
            _, report, one = self.merge(self.device, adapter, "one", workers=1)
            _, _, four = self.merge(self.device, adapter, "four", workers=4)
            count, off, most = differing(here, one)
            right = off <= max(1, ALLOWED * count) and most <= 1 and not report.verified.wrong_elements
            self.table.check(f"{adapter}: {self.title} and cpu", f"{count:,}", off, most, right=right)
            count, off, most = differing(one, four)
            self.table.check(f"{adapter}: one worker and four", f"{count:,}", off, most, right=not off)
        for name in ("here", "one", "four"):
            shutil.rmtree(self.work / name)

    def time_merges(self) -> None:
        """Time the merge by number of workers, next to cp and to the processor."""
        total = sum(file.stat().st_size for file in self.base.glob("*.safetensors"))
        self.table.section(f"merge, {total / 1e9:.2f} GB, torch and the card up", "s", "GB/s")

        def add(name: str, seconds: list[float]) -> None:
            middle = statistics.median(seconds)
            self.table.row(name, f"{middle:.2f}", f"{total / middle / 1e9:.2f}")

        add("cp -r and sync", [self.copy() for _ in range(self.rounds)])
        for workers in WORKERS:
            add(f"DoRA, {self.title}, {workers} workers", self.merges(self.device, "dora", workers=workers))
        add(f"DoRA, {self.title}, no self-check", self.merges(self.device, "dora", verify=False))
        add(f"LoRA, {self.title}", self.merges(self.device, "lora"))
        add("DoRA with an exact record", self.merges(self.device, "dora", undo="exact"))
        add("DoRA, cpu", self.merges("cpu", "dora", as_device=False))
        add("import torch, a process", [self.process("-c", "import torch") for _ in range(self.rounds)])
        command = ("-m", "dora_convert", "merge", self.base, self.base.parent / "dora", "--quiet")
        for device in dict.fromkeys((self.device, "cpu")):
            add(
                f"DoRA on {device}, a whole process",
                [self.process(*command, self.work / "whole", "--device", device) for _ in range(self.rounds)],
            )

    def merges(self, device: str, adapter: str, **options: Any) -> list[float]:
        """Return the seconds of each round of a merge."""
        return [self.merge(device, adapter, "timed", **options)[0] for _ in range(self.rounds)]

    def process(self, *arguments: object) -> float:
        """Return the seconds of a Python process."""
        shutil.rmtree(self.work / "whole", ignore_errors=True)
        started = time.perf_counter()
        subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True)
        return time.perf_counter() - started

    def copy(self) -> float:
        """Return the seconds of a copy and its sync."""
        out = self.work / "copied"
        started = time.perf_counter()
        subprocess.run(["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(self.base), str(out)], check=True)
        seconds = time.perf_counter() - started
        shutil.rmtree(out)
        return seconds

    def time_verbs(self) -> None:
        """Time the other verbs, on the device and on the processor; those that fit adapters on a few layers."""
        self.table.section(f"Other verbs (adapters out: {FEW_LAYERS} layers)", f"{self.title}, s", "cpu, s", "right")
        _, _, merged = self.merge(self.device, "dora", "merged", undo="exact")
        dora, few = self.base.parent / "dora", self.few
        some = {"include": "*.layers.0.self_attn.*"}
        self.on(self.device, dora_convert.merge, few / "base", few / "dora", self.work / "tuned", **some)
        calls: dict[str, tuple[Callable[..., Any], tuple[Path, ...], dict[str, Any]]] = {
            "verify": (dora_convert.verify, (self.base, dora, merged), {}),
            "unmerge": (dora_convert.unmerge, (merged, dora, self.work / "OUT"), {}),
            "to-lora --rank 32": (dora_convert.to_lora, (few / "base", few / "dora", self.work / "OUT"), {"rank": 32}),
            "extract --rank 32": (
                dora_convert.extract,
                (few / "base", self.work / "tuned", self.work / "OUT"),
                {"rank": 32},
            ),
            "from-lora": (dora_convert.from_lora, (few / "base", few / "lora", self.work / "OUT"), {}),
        }
        for name, (call, paths, options) in calls.items():
            found = [self.timed(self.device, call, paths, options), self.timed("cpu", call, paths, options, plain=True)]
            right = all(is_right(report) for _, report in found)
            self.table.check(name, *(f"{seconds:.2f}" for seconds, _ in found), right=right)

    def timed(
        self,
        device: str,
        call: Callable[..., Any],
        paths: tuple[Path, ...],
        options: dict[str, Any],
        *,
        plain: bool = False,
    ) -> tuple[float, Any]:
        """Return the seconds of a call, and its report."""
        shutil.rmtree(self.work / "OUT", ignore_errors=True)
        started = time.perf_counter()
        report = self.on(device, call, *paths, **options, as_device=not plain)
        return time.perf_counter() - started, report


def is_right(report: Any) -> bool:
    """Return True if a report agrees, proves every tensor, or has an error below one."""
    facts = report.to_dict()
    if "verdict" in facts:
        return bool(facts["verdict"] == "agree")
    if exact := facts.get("exact"):
        return bool(exact["tensors"] == exact["bit_exact"])
    return all(module["relative_error"] is None or module["relative_error"] < 1 for module in facts["modules"])


def differing(one: Path, other: Path) -> tuple[int, int, int]:
    """Return the number of elements, the number that differ, and the largest distance in ulps."""
    count = off = most = 0
    for file in sorted(one.glob("*.safetensors")):
        with safe_open(file, "pt") as mine, safe_open(other / file.name, "pt") as theirs:
            for name in mine.keys():  # noqa: SIM118 - a handle is no mapping
                x, y = (each.get_tensor(name).view(torch.int16) for each in (mine, theirs))
                count += x.numel()
                if not torch.equal(x, y):
                    apart = (x.int() - y.int()).abs()
                    off, most = off + int((apart > 0).sum()), max(most, int(apart.max()))
    return count, off, most
