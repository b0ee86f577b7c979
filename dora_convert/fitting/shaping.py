"""Make the tensors of a new adapter that differ from stored ones: scaled, padded, or single numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from ..adapters.new_adapter import ShapedTensor
from ..engine.precision import TORCH
from ..errors import NumericalError
from ..maths import lora as maths
from ..storage.gguf_file import bodies, encode_gguf
from ..storage.reader import Reader, read_whole
from ..storage.safetensors import StoredTensor, read_header


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


def write_instead(path: Path, metadata: Mapping[str, str]) -> None:
    """Replace a safetensors file by one of torch.save or of llama.cpp, as its suffix says."""
    if path.suffix != ".gguf":
        torch.save(load(path.read_bytes()), path)
        return
    tensors = list(read_header(path).tensors.values())
    pairs = {key: float(value) if key.endswith(".alpha") else value for key, value in metadata.items()}
    data = b"".join([encode_gguf(tensors, pairs), *bodies(tensors, read_whole)])
    path.write_bytes(data)
