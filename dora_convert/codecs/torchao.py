"""torchao's tensor subclasses, as transformers saves them as safetensors.

    X._weight_qdata       I8 or F8_E4M3 (N, K)
    X._weight_scale       (N, K/group)
    X._weight_zero_point  I8, of the scale's shape

The file's metadata names each tensor's class and `block_size`, as JSON under the tensor's name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from .blocks import Blocks
from .coded import CodedTensor
from .evidence import Evidence, numbers
from .fp8 import title_of

BYTES = ("Int8Tensor", "Float8Tensor")
"""Classes of 8 bits an element."""
UNPACKED = "IntxUnpackedToInt8Tensor"
"""The class of fewer bits in a byte each."""


@dataclass(frozen=True)
class TorchaoBytes(Blocks):
    """Codes of 8 bits; the values of a merge are written back."""

    writes: ClassVar[str] = "back"


@dataclass(frozen=True)
class TorchaoIntx(Blocks):
    """Codes of fewer bits, which are written again only if the caller asks for it."""

    writes: ClassVar[str] = "asked"


def claim(found: Evidence) -> Iterator[CodedTensor]:
    """Yield every tensor of a class that is read."""
    for before, codes in found.ending("_qdata"):
        module, _, last = before.rpartition("._")
        entry = _entry(found.metadata.get(f"{module}.{last}", ""))
        data = entry.get("_data")
        parts = found.present({"scale": f"{before}_scale", "zero": f"{before}_zero_point"})
        if entry.get("_type") not in (*BYTES, UNPACKED) or not isinstance(data, Mapping) or "scale" not in parts:
            continue
        if len(codes.shape) not in (2, 3) or codes.dtype not in ("I8", "F8_E4M3", "F8_E5M2"):
            continue
        rows, columns = numbers(codes.shape, parts["scale"], list(data.get("block_size") or ())[-2:])
        target = data.get("target_dtype")
        bits = 8 if entry["_type"] in BYTES else _bits(target)
        name = "fp8" if codes.dtype != "I8" else f"int{bits}"
        kind = TorchaoBytes if bits == 8 else TorchaoIntx
        scheme = kind(
            title_of(f"torchao {name}", codes.shape, rows, columns),
            grid=codes.dtype,
            bits=bits,
            height=codes.shape[-2],
            rows=rows,
            columns=columns,
        )
        yield found.dense(f"{module}.{last}", codes.shape, {"codes": codes, **parts}, scheme)


def _entry(text: str) -> Mapping[str, Any]:
    """Return one tensor's entry of the metadata; an empty one for anything else."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, Mapping):
            return value
    return {}


def _bits(target: Any) -> int:
    """Return the bits of a dtype such as int4, as the metadata holds it."""
    name = str(target.get("_data")) if isinstance(target, Mapping) else ""
    digits = name.removeprefix("int").removeprefix("uint")
    return int(digits) if digits.isdecimal() else 8
