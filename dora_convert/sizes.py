"""Parse and format sizes as people write them, and measure this process's memory."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from .errors import UsageError

_UNITS = {"": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
}


def parse_size(text: str | int, option: str) -> int:
    """Return the bytes in a size such as 5GB (powers of ten), 160MiB (powers of two) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", str(text).strip())
    if not match or match[2] not in _UNITS or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise UsageError(f"{option} {text!r} is not a size.", hint=f"{option} 500MB, 5GB or 160MiB")
    return size


def format_size(nbytes: float) -> str:
    """Return a size for reading: three digits and a power of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def peak_memory() -> int | None:
    """Return the most bytes that this process has had in memory; None if the system does not tell."""
    with suppress(OSError):
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(match[1]) * 1024 if match else None
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
