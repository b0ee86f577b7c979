"""Compare a few magnitudes with the rows of the base, without torch: normalised ones, and those of another base."""

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
FAR, NEAR_ONE, OTHER_BASE = math.log(1.4), 0.5, 0.5
"""As in a merge: norms are far from 1 and magnitudes near it; or magnitudes are far from the norms."""
FORMATS = {"F64": "d", "F32": "f", "F16": "e"}


def doubt_magnitudes(plan: Plan) -> Iterator[str]:
    """Yield a warning if magnitudes are normalised, or are those of another base."""
    if not plan.base.is_here:
        return
    samples = [each for each in _samples(plan) if each]
    if not samples:
        return
    m, n = (statistics.median(each[side] for each in samples) for side in (0, 1))
    near = sum(_is_near_one(*each) for each in samples)
    if 2 * near > len(samples):
        yield (
            f"the magnitudes are {m:.2g} in the median and the rows of the base {n:.2g}: they look normalised, "
            "as TensorRT-LLM's normalize_weights.py leaves them; a merge refuses them"
        )
    elif statistics.median(abs(m / n - 1) for m, n in samples) > OTHER_BASE:
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


def _is_near_one(m: float, n: float) -> bool:
    """Return True if magnitudes are near 1, and norms are not."""
    return abs(math.log(n)) > FAR and abs(m - 1) < NEAR_ONE and abs(math.log(m)) < abs(math.log(m / n)) / 2


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
