"""Read some stored numbers while a plan is made: few without torch, many with it."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from importlib import import_module
from typing import TYPE_CHECKING

from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from ..torch_import import without_collections

if TYPE_CHECKING:
    import torch

Question = Callable[[], dict[str, str]]
Questions = list[Question]
_put_off: ContextVar[bool] = ContextVar("_put_off", default=False)


class NeedsTorchError(Exception):
    """Says that an answer takes torch, which is not imported yet."""


def answered(question: Question, later: Questions | None) -> dict[str, str]:
    """Answer a question; if `later` is given and the answer takes torch, put it off, and return no answer."""
    token = _put_off.set(later is not None)
    try:
        return question()
    except NeedsTorchError:
        assert later is not None
        later.append(question)
        return {}
    finally:
        _put_off.reset(token)


def lines_of(W: StoredTensor, rows: Sequence[int], reader: Reader) -> bytearray:
    """Read some rows of a stored matrix."""
    length, first, last = W.matrix[1] * W.itemsize, min(rows), max(rows)
    data = bytearray(len(rows) * length)
    if last - first + 1 == len(rows):  # neighbours
        reader.read(W.path, W.start + first * length, memoryview(data))
    else:
        reader.gather(W.path, [(W.start + row * length, length) for row in rows], data)
    return data


def numbers_of(data: bytes | bytearray, dtype: str) -> tuple[float, ...]:
    """Return stored numbers; bfloat16 is the upper half of float32."""
    if dtype == "BF16":
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        data, dtype = wide, "F32"
    letter, size = {"F64": ("d", 8), "F32": ("f", 4), "F16": ("e", 2)}[dtype]
    return struct.unpack(f"<{len(data) // size}{letter}", data)


def vector(data: bytes | bytearray, dtype: str) -> torch.Tensor:
    """Return stored numbers as a vector in float64: quicker than `numbers_of` once torch is imported.

    Raises NeedsTorchError inside `answered`, if torch is not imported and the answer may wait.
    """
    if not has_torch():
        if _put_off.get():
            raise NeedsTorchError
        with without_collections():
            import_module("torch")
    import torch

    kind = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    return torch.frombuffer(data, dtype=kind).double()


def has_torch() -> bool:
    """Return True if torch is imported."""
    return "torch" in sys.modules


def norms_of(data: bytearray, W: StoredTensor, *, few: bool) -> list[float]:
    """Return the norms of stored rows of a matrix; `few` need no torch, for many it raises as `vector` does."""
    width = W.matrix[1]
    if few and not has_torch():
        length = width * W.itemsize
        rows = (data[start : start + length] for start in range(0, len(data), length))
        return [math.hypot(*numbers_of(row, W.dtype)) for row in rows]
    norms: list[float] = vector(data, W.dtype).view(-1, width).norm(dim=1).tolist()
    return norms


def logs_of(data: bytes | bytearray, dtype: str) -> list[float]:
    """Return the logarithms of stored numbers; NaN for what has none. Needs no torch, but is quicker with it."""
    if not has_torch():
        return list(map(log_of, numbers_of(data, dtype)))
    numbers = vector(data, dtype)
    logs: list[float] = numbers.log().where((numbers > 0) & numbers.isfinite(), math.nan).tolist()
    return logs


def log_of(value: float) -> float:
    """Return the logarithm of a number; NaN if it has none."""
    return math.log(value) if 0 < value < math.inf else math.nan
