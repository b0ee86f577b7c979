"""Make the tensors of a new adapter that differ from stored ones: scaled, padded, or single numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from ..adapters.new_adapter import ShapedTensor
from ..engine.precision import TORCH
from ..errors import NumericalError
from ..maths import lora as maths
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor


def shaped_values(shaped: ShapedTensor, reader: Reader) -> Tensor:
    """Return the values of a tensor of a new file, in float64.

    Raises NumericalError for NaN and Inf.
    """
    if not shaped.source:
        return torch.full(shaped.shape, shaped.scale, dtype=torch.float64)
    values = stored_values(shaped.source, reader) * shaped.scale
    if not maths.all_finite(values):
        raise NumericalError(f"{shaped.source.name} holds NaN or Inf.", hint="the file is damaged")
    if values.numel() == torch.Size(shaped.shape).numel():
        return values.view(shaped.shape)
    whole = torch.zeros(shaped.shape, dtype=torch.float64)
    whole[tuple(slice(size) for size in values.shape)] = values
    return whole


def stored_values(stored: StoredTensor, reader: Reader) -> Tensor:
    """Return a stored tensor, or a view of one, in float64."""
    data = bytearray(b"".join(map(bytes, reader.pieces(stored))))
    return torch.frombuffer(data, dtype=TORCH[stored.dtype]).double().view(stored.shape)


def pickle_instead(path: Path) -> None:
    """Replace a safetensors file by one of torch.save, for programs that read no other."""
    tensors = load(path.read_bytes())
    torch.save(tensors, path)
