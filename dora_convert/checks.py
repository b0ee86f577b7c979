"""What is looked at before the first byte is written, beyond headers: the adapter's values, and a glance at the base's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
import xxhash

from . import maths
from .adapter import Adapter
from .errors import Fault, NumericalError
from .lane import Lane
from .items import Edit
from .plan import Plan
from .precision import TORCH, Choice
from .stored import FLOATS, Reader, Stored
from .updates import Decomposed

CHUNK_BYTES = 1 << 20
SAMPLED_ROWS = 16
SAMPLED_FOR_COLUMNS = 256
OTHER_BASE = 0.5
"""A median |m/‖W‖ − 1| above this means that m was trained on other weights."""


def scan_adapter(adapter: Adapter) -> dict[str, str]:
    """The xxh3-128 of each of an adapter's files, by name.

    Raises NumericalError, naming every tensor that holds NaN or Inf.
    """
    hashes, faults = {}, []
    for path in adapter.files:
        tensors = [tensor for tensor in adapter.tensors.values() if tensor.path == path]
        digest = xxhash.xxh3_128()
        for name, chunk in _chunks(path, tensors):
            digest.update(chunk)
            if name and not _finite(chunk, adapter.tensors[name].dtype):
                faults.append(Fault(name, "holds NaN or Inf"))
        hashes[path.name] = digest.hexdigest()
    if faults:
        raise NumericalError(
            f"The adapter {adapter.source.name} is damaged.", faults=list(dict.fromkeys(faults))
        )
    return hashes


def _chunks(path: Path, tensors: Sequence[Stored]) -> Iterator[tuple[str, bytearray]]:
    """A file from end to end in pieces that each lie in one tensor, named, or in none."""
    with path.open("rb") as file:
        ends = [("", min((tensor.start for tensor in tensors), default=path.stat().st_size))]
        ends += [(tensor.name, tensor.start + tensor.nbytes) for tensor in tensors]
        for name, end in ends:
            while (left := end - file.tell()) > 0:
                yield name, bytearray(file.read(min(left, CHUNK_BYTES)))


def _finite(chunk: bytearray, dtype: str) -> bool:
    return dtype not in FLOATS or maths.all_finite(torch.frombuffer(chunk, dtype=TORCH[dtype]))


def doubt_base(plan: Plan) -> str | None:
    """A warning where DoRA magnitudes do not look like norms of this base, from a sample of its rows."""
    with closing(Reader()) as reader:
        lane = Lane(Choice(torch.device("cpu"), torch.float64, "a sample"), reader)
        ratios = [
            _deviation(item.source, edit, edit.update, lane)
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


def _deviation(tensor: Stored, edit: Edit, update: Decomposed, lane: Lane) -> torch.Tensor:
    """|m/‖W‖ − 1| for some outputs of one weight."""
    m = lane.whole(update.m).flatten()
    rows = tensor.matrix[0]
    wanted = SAMPLED_FOR_COLUMNS if edit.two_passes else SAMPLED_ROWS
    chosen = sorted({round(k * (rows - 1) / max(1, wanted - 1)) for k in range(min(wanted, rows))})
    sample = torch.cat([lane.rows(tensor, row, row + 1) for row in chosen])
    if edit.two_passes:  # the norm of a column from some of its elements
        n = maths.norms(sample, axis=0) * (rows / len(chosen)) ** 0.5
    else:
        n, m = maths.norms(sample, axis=1), m[chosen]
    deviation: torch.Tensor = (m / n - 1).abs()
    return deviation
