"""Read a model in llama.cpp's GGUF files: raw tensors by their own names, and a config made from its pairs.

A model is one file, or files named `NAME-00001-of-00003.gguf`. The first file's pairs count. Files named mmproj* are
image encoders and do not count.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..errors import RefError, UnsupportedError
from .filenames import FileStates, file_states, gguf_parts, is_plain
from .gguf_config import make_config
from .gguf_file import GgufFrame, read_frame
from .json_files import read_config
from .reader import read_whole
from .refs import Source
from .safetensors import StoredTensor

ROTARY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that hold what a config says of rotary embeddings."""
FORMAT = {"format": "pt"}
MARK = {"quantization_config": {"quant_method": "gguf"}}


@dataclass(frozen=True)
class GgufModel:
    """The name and the pairs of a model in GGUF files."""

    name: str
    pairs: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """The name of the architecture in llama.cpp."""
        return str(self.pairs.get("general.architecture", ""))

    def number(self, key: str) -> int:
        """Return a number of the architecture, such as attention.head_count; 0 if there is none."""
        value = self.pairs.get(f"{self.architecture}.{key}")
        return value if type(value) is int else 0


class FoundModel(NamedTuple):
    """A model's files, as far as their headers tell."""

    model: GgufModel
    shards: Sequence[tuple[str, Mapping[str, str], tuple[StoredTensor, ...]]]
    """The files by the names that their dense tensors get, with metadata and tensors."""
    index_name: str | None
    config: dict[str, Any]
    states: FileStates


def read_model(source: Source, name: str, beside: Sequence[str]) -> FoundModel:
    """Read the headers of a model's files; beside a lone file no other file counts.

    Raises UnsupportedError for architectures that are not read.
    """
    names, alone = gguf_parts(name), source.path.is_file()
    root = source.path.parent if alone else source.path
    if missing := [each for each in names if not is_plain(each) or not (root / each).is_file()]:
        raise RefError(f"{source.name} lacks {', '.join(missing[:5])}.", hint="download all parts")
    states = file_states(root / each for each in (*names, *beside))
    frames = [read_frame(root / each) for each in names]
    model = GgufModel(source.name, frames[0].pairs)
    if model.pairs.get("general.type", "model") != "model":
        raise UnsupportedError(f"{source.name} is a GGUF {model.pairs['general.type']}, not a model.")
    tensors = {name: tensor for frame in frames for name, tensor in frame.tensors.items()}
    factors = {name: _numbers(tensors[name]) for name in ROTARY_FACTORS if name in tensors}
    config = (None if alone else read_config(root)) or make_config(source.name, model.pairs, tensors, factors)
    several = len(names) > 1
    shards = [
        (
            f"model-{number:05d}-of-{len(names):05d}.safetensors" if several else "model.safetensors",
            FORMAT,
            _kept(frame),
        )
        for number, frame in enumerate(frames, 1)
    ]
    index = "model.safetensors.index.json" if several else None
    return FoundModel(model, shards, index, {**config, **MARK}, states)


def _kept(frame: GgufFrame) -> tuple[StoredTensor, ...]:
    """Return the tensors of a file that are weights, those of all experts cut into experts."""
    weights = (tensor for tensor in frame.tensors.values() if tensor.name not in ROTARY_FACTORS)
    return tuple(each for tensor in weights for each in _experts(tensor))


def _experts(tensor: StoredTensor) -> Iterator[StoredTensor]:
    """Yield a tensor of all experts as one tensor for each, whose name ends in the expert's number."""
    if "_exps." not in tensor.name or len(tensor.shape) != 3:
        yield tensor
        return
    size = tensor.nbytes // max(1, tensor.shape[0])
    for expert in range(tensor.shape[0]):
        start = tensor.start + expert * size
        yield replace(tensor, name=f"{tensor.name}[{expert}]", shape=tensor.shape[1:], start=start)


def _numbers(tensor: StoredTensor) -> list[float]:
    """Return the values of a small float32 tensor."""
    if tensor.dtype != "F32" or tensor.numel > 1 << 16:
        raise UnsupportedError(f"{tensor.path}: {tensor.name} is {tensor.dtype}, not F32.")
    return list(struct.unpack(f"<{tensor.numel}f", read_whole(tensor)))
