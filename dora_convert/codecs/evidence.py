"""Collect what tells of quantisation: headers, metadata of files, and the places where a config may say so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..storage.checkpoint import Checkpoint
from ..storage.json_files import read_json
from ..storage.reader import read_whole
from ..storage.safetensors import CONFIG_DTYPES, StoredTensor
from .coded import CodedTensor, Scheme

PLACES = ("quantization_config", "compression_config", "quantization")
"""Keys of a config that describe quantisation, in the order in which they count."""
SIDE_FILE = "hf_quant_config.json"
"""NVIDIA modelopt's description, beside the config."""
OF_INPUTS = ("input_scale", "input_zero_point", "input_global_scale", "activation_scale", "input_g_idx")
"""Parts that are for the inputs of a module: copied with the codes, and of no use to a dense weight."""
LIKE_SCALES = ("BF16", "F16", "F32")
"""Dtypes of scales that a dense weight may have, too."""
LARGEST_NOTE = 1 << 16
"""Bytes of a part that is read to learn a tensor's shape."""


@dataclass(frozen=True)
class Evidence:
    """A base's headers and all that its configs say of quantisation."""

    base: Checkpoint
    asked: str | None = None
    """The dtype that the caller wants dense weights in."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The tensors on disk, by name."""
        return self.base.tensors

    @cached_property
    def methods(self) -> tuple[Mapping[str, Any], ...]:
        """Every description of quantisation, the config's first."""
        said = [config.get(key) for key in PLACES for config in self.base.configs]
        side = self.base.root / SIDE_FILE
        if not self.base.is_file and side.is_file():
            inner = read_json(side).get("quantization")
            said.append({"quant_method": "modelopt", **inner} if isinstance(inner, Mapping) else None)
        return tuple(one for one in said if isinstance(one, Mapping))

    def method(self, *names: str) -> Mapping[str, Any] | None:
        """Return the description with one of these methods; None if no place names one."""
        return next((one for one in self.methods if one.get("quant_method") in names), None)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of all weight files together."""
        return {key: text for shard in self.base.shards for key, text in shard.metadata.items()}

    def ending(self, suffix: str) -> Iterator[tuple[str, StoredTensor]]:
        """Yield the tensors whose names end so, each after the rest of its name."""
        for name, tensor in self.tensors.items():
            if name.endswith(suffix):
                yield name.removesuffix(suffix), tensor

    def of_inputs(self, module: str) -> dict[str, StoredTensor]:
        """Return the scales of a module's inputs, which only quantised weights have a use for."""
        return self.present({last: f"{module}.{last}" for last in OF_INPUTS})

    def present(self, names: Mapping[str, str]) -> dict[str, StoredTensor]:
        """Return those parts that the base has, from their names by role."""
        return {role: self.tensors[name] for role, name in names.items() if name in self.tensors}

    def bytes_of(self, part: StoredTensor) -> bytes | None:
        """Return the bytes of a small part; None if the part is not on this machine."""
        local = part.nbytes <= LARGEST_NOTE and part.path.is_file()
        return read_whole(part) if local else None

    def dense(
        self, name: str, shape: tuple[int, ...], parts: Mapping[str, StoredTensor], scheme: Scheme, said: str = ""
    ) -> CodedTensor:
        """Return a dense weight. `said` is the dtype that the parts themselves name."""
        codes = parts["codes"]
        dtype = self.asked or self._said or said or self._like(parts.get("scale"))
        return CodedTensor(name, dtype, shape, path=codes.path, start=codes.start, scheme=scheme, parts=parts)

    @cached_property
    def _said(self) -> str:
        """The dtype that the config names, as safetensors calls it; empty if it names none."""
        short = {name: dtype for dtype, name in CONFIG_DTYPES.items()}
        named = [config.get(key) for config in self.base.configs for key in ("dtype", "torch_dtype")]
        return next((short[name] for name in named if isinstance(name, str) and name in short), "")

    @staticmethod
    def _like(scale: StoredTensor | None) -> str:
        return scale.dtype if scale and scale.dtype in LIKE_SCALES else "BF16"


def numbers(shape: tuple[int, ...], scale: StoredTensor, block: Any = None) -> tuple[int, int]:
    """Return the rows and columns that share a scale, from the shapes of a weight and of its scales.

    `block` is what the config says; it decides where blocks are cut off.
    """
    rows, columns = shape[-2:]
    if scale.numel in (1, shape[0] if len(shape) == 3 else 1):
        return rows, columns
    down, across = (scale.shape[-2:] if len(scale.shape) > 1 else (scale.numel, 1))[-2:]
    if isinstance(block, (list, tuple)) and len(block) == 2:
        high, wide = int(block[0]), int(block[1])
        if high > 0 and wide > 0 and (-(-rows // high), -(-columns // wide)) == (down, across):
            return high, wide
    return share(rows, down), share(columns, across)


def share(length: int, parts: int) -> int:
    """Return the length of a part, if a length has so many: all, an equal share, or the least power of two."""
    if parts <= 1:
        return max(1, length)
    if length % parts == 0:
        return length // parts
    power = 1
    while -(-length // power) > parts:
        power *= 2
    return power


def matches(module: str, pattern: str) -> bool:
    """Return True if a name or a regular expression of a config's list means a module."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.endswith(f".{pattern}")
