"""dora-convert env: the facts that a bug report needs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..reports import Report, Table, table
from ..settings import __version__, format_size, usual_workers
from ..torch_import import without_collections
from . import command, takes_sink
from .sink import Sink

PACKAGES = (
    "torch", "safetensors", "huggingface_hub", "msgspec", "zstandard", "xxhash", "click", "rich", "tqdm", "jinja2",
    "filelock", "transformers", "peft", "accelerate", "trl", "vllm", "bitsandbytes",
)  # fmt: skip
VARIABLES = (
    "DORA_CONVERT_", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "TQDM_DISABLE", "NO_COLOR", "FORCE_COLOR",
)  # fmt: skip
"""Beginnings of the environment variables that are shown; no token is among them."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentReport(Report):
    """The report of env."""

    facts: dict[str, str]
    """System, Python, devices and memory."""
    packages: dict[str, str | None]
    """The version of each package; None if it is not installed."""
    variables: dict[str, str]
    """The environment variables that matter, without tokens."""
    command: str = "env"

    def parts(self, *, every: bool) -> Iterator[Table | str]:
        """Yield one table; `every` lists packages that are not installed, too."""
        found = {name: text or "not installed" for name, text in self.packages.items() if text or every}
        yield table(("what", "value"), [*self.facts.items(), *found.items(), *self.variables.items()])


@command("env")
@takes_sink
def env(*, sink: Sink) -> None:
    """Print versions, devices and settings, for a bug report.

    Tokens are never printed.
    """
    facts = {
        "dora-convert": __version__,
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "processors": f"{os.cpu_count()}, {usual_workers()} used by default",
        "memory": _memory(),
        "disk": f"{format_size(shutil.disk_usage('.').free)} free here",
        "devices": _devices(),
    }
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    report = EnvironmentReport(
        seconds=0.0, facts=facts, packages={name: _version(name) for name in PACKAGES}, variables=variables
    )
    sink.show(report, f"dora-convert {__version__}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory() -> str:
    """Return the machine's memory, as far as the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return f"{format_size(sizes['MemTotal'])}, {format_size(sizes['MemAvailable'])} available"


def _devices() -> str:
    """Return the devices that torch can use."""
    with without_collections():
        import torch
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    names += ["mps"] if torch.backends.mps.is_available() else []
    return ", ".join(["cpu", *names])
