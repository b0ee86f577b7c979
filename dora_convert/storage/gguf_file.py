"""Read and write the frame of GGUF files: key–value pairs, names and places of tensors.

All numbers are little endian. A string is its length as 8 bytes and its UTF-8 bytes. The frame:

    "GGUF"  version 4 bytes  number of tensors 8  number of pairs 8
    pairs   key, type 4, value
    tensors name, number of dimensions 4, each dimension 8 with the fastest first, type 4, offset 8
    padding to general.alignment (32), then the tensors, each padded likewise
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import MalformedError, UnsupportedError
from ..records import record
from .safetensors import Header, StoredTensor, is_possible, open_file

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32
DTYPES = {0: "F32", 1: "F16", 30: "BF16", 28: "F64"}
BLOCKS = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""The quantised types: name, elements of a block, bytes of a block."""
CODES = {name: code for code, name in DTYPES.items()}
MOST = 1_000_000
"""Pairs, tensors, elements of an array, and bytes of a string."""
MOST_DIMENSIONS = 4
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _FLOAT = 8, 9, 6


class _Frame:
    """Reads one value after the other."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def take(self, letter: str) -> Any:
        """Return one number."""
        size = struct.calcsize(f"<{letter}")
        data = self.file.read(size)
        if len(data) < size:
            raise ValueError("the file ends too early")
        return struct.unpack(f"<{letter}", data)[0]

    def count(self) -> int:
        """Return a number of things."""
        count: int = self.take("Q")
        if count > MOST:
            raise ValueError(f"{count} is too many")
        return count

    def text(self) -> str:
        """Return a string."""
        length = self.count()
        data = self.file.read(length)
        if len(data) < length:
            raise ValueError("the file ends too early")
        return data.decode()

    def numbers(self, letter: str, count: int) -> list[Any]:
        """Return some numbers."""
        form = f"<{count}{letter}"
        return list(struct.unpack(form, self.file.read(struct.calcsize(form))))

    def value(self, kind: int) -> Any:
        """Return a value of a type."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.take("I"), self.count()
            if inner == _ARRAY:
                raise ValueError("an array of arrays")
            return [self.text() for _ in range(count)] if inner == _STRING else self.numbers(_NUMBERS[inner], count)
        return self.take(_NUMBERS[kind])


@record(frozen=True, slots=True)
class BlockTensor(StoredTensor):
    """A quantised tensor as bytes: its last dimension counts the bytes of a row."""

    kind: str
    """The type's name, such as Q4_K."""
    width: int
    """The elements of a row."""


@dataclass(frozen=True)
class GgufFrame:
    """All that a file says: its tensors in their order, and its pairs."""

    tensors: Mapping[str, StoredTensor]
    pairs: Mapping[str, Any]


def read_gguf(path: Path) -> Header:
    """Return a file's tensors, with its pairs as metadata; MalformedError for anything else.

    Raises UnsupportedError for quantised tensors.
    """
    frame = read_frame(path)
    for tensor in frame.tensors.values():
        if isinstance(tensor, BlockTensor):
            raise UnsupportedError(f"{path}: {tensor.name} is quantised ({tensor.kind}); only plain dtypes are read.")
    return Header(frame.tensors, {key: str(value) for key, value in frame.pairs.items()})


def read_frame(path: Path) -> GgufFrame:
    """Return a file's tensors and pairs; MalformedError for anything else.

    Raises UnsupportedError for types of tensors that are not known.
    """
    try:
        with open_file(path) as file:
            return _read(path, _Frame(file), os.fstat(file.fileno()).st_size)
    except (ValueError, KeyError, struct.error, RecursionError, MemoryError) as error:
        raise MalformedError(f"{path} is not a valid GGUF file ({error}).", hint="download it again") from error


def _read(path: Path, frame: _Frame, size: int) -> GgufFrame:
    if frame.file.read(4) != MAGIC or frame.take("I") not in VERSIONS:
        raise ValueError("not GGUF of version 2 or 3")
    tensors, pairs = frame.count(), frame.count()
    metadata = {frame.text(): frame.value(frame.take("I")) for _ in range(pairs)}
    entries = [_entry(path, frame) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= MOST:
        raise ValueError("the alignment is not a number of bytes")
    body = -(-frame.file.tell() // alignment) * alignment
    stored = {name: _placed(path, body + offset, name, code, shape) for name, code, shape, offset in entries}
    if len(stored) < tensors or any(tensor.start + tensor.nbytes > size for tensor in stored.values()):
        raise ValueError("a tensor occurs twice, or ends behind the file")
    return GgufFrame(stored, metadata)


def _placed(path: Path, start: int, name: str, code: int, shape: tuple[int, ...]) -> StoredTensor:
    """Return a tensor at its place; ValueError for rows that are not of whole blocks."""
    if code in DTYPES:
        return StoredTensor(name, DTYPES[code], shape, path, start)
    kind, elements, nbytes = BLOCKS[code]
    if not shape or shape[-1] % elements:
        raise ValueError(f"{name}: a row is not of whole blocks")
    held = (*shape[:-1], shape[-1] // elements * nbytes)
    return BlockTensor(name, "U8", held, path, start, kind=kind, width=shape[-1])


def _entry(path: Path, frame: _Frame) -> tuple[str, int, tuple[int, ...], int]:
    """Return a tensor's name, type, shape and offset."""
    name, dimensions = frame.text(), frame.take("I")
    if dimensions > MOST_DIMENSIONS:
        raise ValueError("too many dimensions")
    shape = tuple(frame.take("Q") for _ in range(dimensions))[::-1]
    code, offset = frame.take("I"), frame.take("Q")
    if code not in DTYPES and code not in BLOCKS:
        raise UnsupportedError(f"{path}: {name} is quantised by GGML type {code}, which is not read.")
    if not is_possible(shape):
        raise ValueError("not a shape")
    return name, code, shape, offset


def encode_gguf(tensors: Sequence[Any], pairs: Mapping[str, str | float]) -> bytes:
    """Return the bytes that open a GGUF file of tensors; each tensor is padded to 32 bytes."""

    def text(value: str) -> bytes:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data

    head = MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(pairs))
    for key, value in pairs.items():
        is_text = isinstance(value, str)
        head += text(key) + struct.pack("<I", _STRING if is_text else _FLOAT)
        head += text(value) if isinstance(value, str) else struct.pack("<f", value)
    offset = 0
    for tensor in tensors:
        head += text(tensor.name) + struct.pack("<I", len(tensor.shape))
        head += b"".join(struct.pack("<Q", size) for size in reversed(tensor.shape))
        head += struct.pack("<IQ", CODES[tensor.dtype], offset)
        offset += padded(tensor.nbytes)
    return head + b"\0" * (-len(head) % ALIGNMENT)


def padded(size: int) -> int:
    """Return a number of bytes, rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def bodies(tensors: Sequence[StoredTensor], read: Callable[[StoredTensor], bytes]) -> Iterator[bytes]:
    """Yield each tensor's bytes and its padding."""
    for tensor in tensors:
        yield read(tensor) + b"\0" * (padded(tensor.nbytes) - tensor.nbytes)
