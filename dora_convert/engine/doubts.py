"""Look for doubtful values in samples of an adapter and its base, before the first byte is written."""

from __future__ import annotations

import math
import statistics
from array import array
from collections.abc import Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from ..adapters import Decomposed
from ..errors import Fault, UnsupportedError
from ..maths import lora as maths
from ..plan.item import Edit, Item
from ..plan.plan import Plan
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .device_buffers import DeviceBuffers
from .precision import ComputeSpec, read_rows

MOST_SAMPLED = 256
"""Modules that are looked at; of more, so many are chosen evenly."""
SAMPLED_ROWS = 16
SAMPLED_FOR_COLUMNS = 256
OTHER_BASE = 0.5
"""A median |m/‖W‖ − 1| above this means that m was trained on other weights."""
NEAR_ONE, FAR = 0.5, math.log(1.4)
"""Normalised magnitudes are this near to 1 in the median, where log ‖W‖ is farther than this from 0."""


def check_magnitudes(plan: Plan) -> str | None:
    """Return a warning if DoRA magnitudes do not look like norms of this base, from a sample of its rows.

    Raises UnsupportedError if magnitudes were divided by the norms of their weights.
    """
    with closing(Reader()) as reader:
        buffers = DeviceBuffers(ComputeSpec(torch.device("cpu"), torch.float64, "sample"), reader)
        samples = {
            f"{item.name}{list(edit.outputs or '')}".removesuffix("[]"): tuple(
                map(_kept, _sample(item.source, edit, update, buffers))
            )
            for item, edit, update in _chosen(plan)
        }
    known = {
        name: (torch.tensor(m.tolist(), dtype=torch.float64), torch.tensor(n.tolist(), dtype=torch.float64))
        for name, (m, n) in samples.items()
    }
    _refuse_normalised(plan, known)
    ratios = [(m / n - 1).abs() for m, n in known.values()]
    if not ratios or (median := torch.cat(ratios).nanmedian().item()) <= OTHER_BASE:
        return None
    return (
        f"another base? The adapter's magnitudes differ from the norms of {plan.base.source.name} by "
        f"{median:.0%} in the median; those of its own base differ by a few percent."
    )


def _chosen(plan: Plan) -> Sequence[tuple[Item, Edit, Decomposed]]:
    """Return the edits that divide by norms, or as many of them as are looked at."""
    edits = [
        (item, edit, edit.update)
        for item in plan.items
        for edit in item.edits
        if isinstance(edit.update, Decomposed) and edit.divides
    ]
    return edits[:: math.ceil(len(edits) / MOST_SAMPLED) or 1]


def _kept(numbers: Tensor) -> array[float]:
    """Return numbers outside of the C library's heap: between larger blocks that are freed, they would break it up."""
    return array("d", numbers.tolist())


def _refuse_normalised(plan: Plan, samples: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raise UnsupportedError for modules whose magnitudes are near 1, and whose rows are not."""
    medians = {name: (m.nanmedian().item(), n.nanmedian().item()) for name, (m, n) in samples.items()}
    near = {name: (m, n) for name, (m, n) in medians.items() if _is_near_one(m, n)}
    others = [m / n for name, (m, n) in medians.items() if name not in near]
    if 10 * len(near) <= len(medians) or (others and abs(statistics.median(others) - 1) > OTHER_BASE):
        return  # weights of another base explain the other modules
    if len(near) > 1:  # and so they do if m is as far from ‖W‖ in every module, rather than near 1 in every module
        m_differs = statistics.stdev(math.log(m) for m, _ in near.values())
        if m_differs > statistics.stdev(math.log(m / n) for m, n in near.values()):
            return
    faults = [
        Fault(name.removesuffix(".weight"), f"its magnitudes are {m:.2g} in the median, the rows of the base {n:.2g}")
        for name, (m, n) in near.items()
    ]
    names = ", ".join(adapter.source.name for adapter in plan.adapters)
    among = f" (among {len(samples)} that were looked at)" if 2 * len(samples) > MOST_SAMPLED else ""
    raise UnsupportedError(
        f"The magnitudes of {len(faults)} modules{among} of {names} are normalised: divided by the norms of the rows.",
        faults=faults,
        hint="TensorRT-LLM's normalize_weights.py writes m/‖V‖ under the same name: name the adapter before that",
    )


def _is_near_one(m: float, n: float) -> bool:
    """Return True if magnitudes are near 1 in the median, and the norms of the rows are not."""
    is_far = n > 0 and abs(math.log(n)) > FAR
    return is_far and abs(m - 1) < NEAR_ONE and abs(math.log(m)) < abs(math.log(m / n)) / 2


def _sample(tensor: StoredTensor, edit: Edit, update: Decomposed, buffers: DeviceBuffers) -> tuple[Tensor, Tensor]:
    """Return m and ‖W‖ for some outputs of one weight, or ‖W + sBA‖ if m is nearer to that."""
    m = buffers.whole(update.m).flatten()
    first, last = edit.own_rows(0, tensor.matrix[0])
    rows = last - first
    wanted = SAMPLED_FOR_COLUMNS if edit.two_passes else SAMPLED_ROWS
    chosen = sorted({round(k * (rows - 1) / max(1, wanted - 1)) for k in range(min(wanted, rows))})
    sample = read_rows(buffers.reader, tensor, [first + row for row in chosen]).to(buffers.spec.compute)
    if edit.two_passes:  # the norm of a column, estimated from some of its elements
        own = sample[:, slice(*edit.outputs)] if edit.outputs else sample
        n = maths.norms(own, axis=0) * (rows / len(chosen)) ** 0.5
        return m, torch.linalg.vector_norm(n.view(len(m), -1), dim=1)  # a convolution's inputs have a kernel each
    m, n = m[chosen], maths.norms(sample, axis=1)
    low = edit.low
    if not low or low.d or low.b or low.start or low.blocks != (1, 1) or (m / n).log().abs().nanmedian() <= FAR:
        return m, n
    B = read_rows(buffers.reader, low.B, chosen).to(buffers.spec.compute)
    changed = maths.norms(maths.add_low_rank_(sample, B, buffers.whole(low.A), low.scale), axis=1)
    is_nearer = (m / changed).log().abs().nanmedian() < (m / n).log().abs().nanmedian()
    return m, changed if is_nearer else n  # a large change: m is a norm of V, far from that of W
