"""Open a model in llama.cpp's GGUF files as a checkpoint: raw tensors by their own names, and a config of its pairs.

A model is one file, or files named `NAME-00001-of-00003.gguf`. The first file's pairs count. Files named mmproj* are
image encoders and do not count.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import RefError, UnsupportedError
from .checkpoint import Checkpoint, Shard
from .filenames import file_states, is_plain
from .gguf_config import make_config
from .gguf_file import GgufFrame, read_frame
from .json_files import read_config
from .reader import read_whole
from .refs import Source
from .safetensors import StoredTensor

SUFFIX = ".gguf"
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
ROTARY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that hold what a config says of rotary embeddings."""
MARK = {"quantization_config": {"quant_method": "gguf"}}


@dataclass(frozen=True)
class GgufModel:
    """What a model's GGUF files say beside the tensors."""

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


def files_of_model(names: Sequence[str]) -> list[str]:
    """Return the GGUF files of the only model among some files; raise RefError if there are several."""
    files = sorted(name for name in names if name.endswith(SUFFIX) and not name.startswith("mmproj"))
    models = {SPLIT.sub("", name): name for name in reversed(files)}
    if len(models) > 1:
        raise RefError(f"Several GGUF models: {', '.join(sorted(models.values()))}.", hint="name one file")
    return parts_of(files[0]) if files else []


def parts_of(name: str) -> list[str]:
    """Return the names of all files of a model, from the name of one."""
    if not (match := SPLIT.search(name)):
        return [name]
    stem, many = name[: match.start()], int(match[2])
    return [f"{stem}-{number:05d}-of-{many:05d}{SUFFIX}" for number in range(1, many + 1)]


def open_gguf(
    source: Source, names: Sequence[str], side_files: Sequence[str] = (), left: Sequence[str] = ()
) -> Checkpoint:
    """Open the files of a model; beside a lone file no other file counts.

    Raises UnsupportedError for architectures that are not read.
    """
    alone = source.path.is_file()
    root = source.path.parent if alone else source.path
    if missing := [name for name in names if not is_plain(name) or not (root / name).is_file()]:
        raise RefError(f"{source.name} lacks {', '.join(missing[:5])}.", hint="download all parts")
    states = file_states(root / name for name in (*names, *side_files))
    frames = [read_frame(root / name) for name in names]
    model = GgufModel(source.name, frames[0].pairs)
    if model.pairs.get("general.type", "model") != "model":
        raise UnsupportedError(f"{source.name} is a GGUF {model.pairs['general.type']}, not a model.")
    tensors = {name: tensor for frame in frames for name, tensor in frame.tensors.items()}
    factors = {name: _numbers(tensors[name]) for name in ROTARY_FACTORS if name in tensors}
    config = (None if alone else read_config(root)) or make_config(source.name, model.pairs, tensors, factors)
    shards = tuple(_shard(names, number, frame) for number, frame in enumerate(frames))
    index = None if len(names) == 1 else "model.safetensors.index.json"
    return Checkpoint(
        source, shards, index, {**config, **MARK}, tuple(side_files), tuple(left), states=states, gguf=model
    )


def _shard(names: Sequence[str], number: int, frame: GgufFrame) -> Shard:
    """Return one file with the name that its dense tensors get."""
    part = f"-{number + 1:05d}-of-{len(names):05d}" if len(names) > 1 else ""
    tensors = tuple(
        each for tensor in frame.tensors.values() if tensor.name not in ROTARY_FACTORS for each in _experts(tensor)
    )
    return Shard(f"model{part}.safetensors", {"format": "pt"}, tensors)


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
