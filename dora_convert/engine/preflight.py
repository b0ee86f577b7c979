"""Check the adapter's values, and sample the base's, before the first byte is written."""

from __future__ import annotations

from contextlib import closing

import torch

from ..adapters.adapter import Adapter, Decomposed
from ..errors import Fault, NumericalError
from ..maths import lora as maths
from ..plan.item import Edit
from ..plan.plan import Plan
from ..storage.reader import Reader, xxh3
from ..storage.safetensors import FLOATS, StoredTensor
from .device_buffers import DeviceBuffers
from .precision import TORCH, ComputeSpec

SAMPLED_ROWS = 16
SAMPLED_FOR_COLUMNS = 256
OTHER_BASE = 0.5
"""A median |m/‖W‖ − 1| above this means that m was trained on other weights."""


def scan_adapter(adapter: Adapter) -> dict[str, str]:
    """Return the xxh3-128 of each of an adapter's files, by name.

    Raises NumericalError, naming every tensor that holds NaN or Inf.
    """
    hashes = {path.name: xxh3(path) for path in adapter.files}
    with closing(Reader()) as reader:
        damaged = [tensor for tensor in adapter.tensors.values() if not _finite(tensor, reader)]
    if damaged:
        raise NumericalError(
            f"The adapter {adapter.source.name} is damaged.",
            faults=[Fault(tensor.name, "holds NaN or Inf") for tensor in damaged],
        )
    return hashes


def _finite(tensor: StoredTensor, reader: Reader) -> bool:
    return all(holds_numbers(piece, tensor.dtype) for piece in reader.pieces(tensor))


def holds_numbers(piece: memoryview, dtype: str) -> bool:
    """Return True if no element is NaN or infinite, in dtypes that have such values."""
    return dtype not in FLOATS or maths.all_finite(torch.frombuffer(piece, dtype=TORCH[dtype]))


def doubt_base(plan: Plan) -> str | None:
    """Return a warning if DoRA magnitudes do not look like norms of this base, from a sample of its rows."""
    with closing(Reader()) as reader:
        buffers = DeviceBuffers(ComputeSpec(torch.device("cpu"), torch.float64, "sample"), reader)
        ratios = [
            _deviation(item.source, edit, edit.update, buffers)
            for item in plan.items
            for edit in item.edits
            if isinstance(edit.update, Decomposed)
        ]
    if not ratios or (median := torch.cat(ratios).nanmedian().item()) <= OTHER_BASE:
        return None
    return (
        f"another base? The adapter's magnitudes differ from the norms of {plan.base.source.name} by "
        f"{median:.0%} in the median; those of its own base differ by a few percent."
    )


def _deviation(tensor: StoredTensor, edit: Edit, update: Decomposed, buffers: DeviceBuffers) -> torch.Tensor:
    """Return |m/‖W‖ − 1| for some outputs of one weight."""
    m = buffers.whole(update.m).flatten()
    rows = tensor.matrix[0]
    wanted = SAMPLED_FOR_COLUMNS if edit.two_passes else SAMPLED_ROWS
    chosen = sorted({round(k * (rows - 1) / max(1, wanted - 1)) for k in range(min(wanted, rows))})
    sample = torch.cat([buffers.rows(tensor, row, row + 1) for row in chosen])
    if edit.two_passes:  # the norm of a column, estimated from some of its elements
        n = maths.norms(sample, axis=0) * (rows / len(chosen)) ** 0.5
    else:
        n, m = maths.norms(sample, axis=1), m[chosen]
    deviation: torch.Tensor = (m / n - 1).abs()
    return deviation
