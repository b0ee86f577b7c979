"""Compare a few magnitudes with the rows of the base, without torch: those of another base are far off."""

from __future__ import annotations

import math
import statistics
import struct
from collections.abc import Iterator

from ...adapters import Decomposed
from ...plan.plan import Plan
from ...storage.safetensors import StoredTensor

MODULES, ROWS = 12, 8
"""Modules and rows of each that are looked at."""
OTHER_BASE = 0.5
"""A median |m/‖W‖ − 1| above this means that m was trained on other weights, as in a merge."""
FORMATS = {"F64": "d", "F32": "f", "F16": "e"}


def doubt_magnitudes(plan: Plan) -> Iterator[str]:
    """Yield a warning if magnitudes are those of another base."""
    if not plan.base.is_here:
        return
    samples = [each for each in _samples(plan) if each]
    if not samples:
        return
    if statistics.median(abs(m / n - 1) for m, n in samples) > OTHER_BASE:
        m, n = (statistics.median(each[side] for each in samples) for side in (0, 1))
        yield f"another base? The magnitudes are {m:.2g} in the median, the norms of the base's rows {n:.2g}"


def _samples(plan: Plan) -> Iterator[tuple[float, float] | None]:
    """Yield the medians of some m and of the norms of the same rows, for some modules."""
    pairs = [
        (item.source, edit.update)
        for item in plan.items
        for edit in item.edits
        if isinstance(edit.update, Decomposed) and not edit.two_passes and not edit.update.normalised
    ]
    for stored, update in pairs[:: max(1, len(pairs) // MODULES)]:
        plain = type(stored) is StoredTensor and type(update.m) is StoredTensor
        if not plain or update.m.numel != stored.matrix[0] or not update.m.path.is_file():
            continue
        height, width = stored.matrix
        rows = range(0, height, max(1, height // ROWS))
        norms = [math.hypot(*_values(stored, row * width, width)) for row in rows]
        sizes = [abs(_values(update.m, row, 1)[0]) for row in rows]
        middle = statistics.median(sizes), statistics.median(norms)
        yield middle if all(middle) and all(map(math.isfinite, middle)) else None


def _values(tensor: StoredTensor, start: int, count: int) -> tuple[float, ...]:
    """Return some elements of a stored tensor; zeros for a dtype that is not decoded here."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.start + start * tensor.itemsize)
        data = file.read(count * tensor.itemsize)
    if tensor.dtype == "BF16":  # the upper half of a float32
        data = b"".join(b"\0\0" + data[k : k + 2] for k in range(0, len(data), 2))
    elif tensor.dtype not in FORMATS:
        return (0.0,) * count
    return struct.unpack(f"<{count}{FORMATS.get(tensor.dtype, 'f')}", data)
