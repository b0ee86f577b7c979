"""Read and write the headers of safetensors files, strictly.

The format: eight bytes with the header's length N (little endian), N bytes of JSON, then the tensors' bytes
without gaps. Each JSON entry holds `dtype`, `shape` and `data_offsets` relative to the end of the header;
`__metadata__` holds strings. A header is at most 100 MB.

The safetensors library reads the same header, but keeps the offsets to itself and maps whole files into
memory, which is why this file exists: merges are planned from headers and read in blocks.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeGuard

from ..errors import MalformedError, hint_of

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element of every dtype the format knows."""

FLOATS = ("BF16", "F16", "F32", "F64")
"""The dtypes arithmetic is done on; all others are copied as bytes."""

CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""The dtypes that an output may be converted to, as configs and command lines name them."""

MAX_HEADER = 100_000_000
MAX_TENSORS = 500_000
"""Tensors in one file; the largest models have a fifth of them, over all their files."""
MAX_VALUES = 1_000_000
"""Other values in a header, such as entries of metadata."""
MAX_DIMENSIONS = 64
MAX_DIGITS = 19
MAX_ELEMENTS = 2**60
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk: its safetensors dtype and shape, and the absolute byte where it starts."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int

    is_view: ClassVar[bool] = False
    """True for a `StoredView`, whose elements do not lie one after the other."""

    @property
    def kept(self) -> int:
        """Bytes that a reader keeps between reads of parts of the tensor."""
        return 0

    @property
    def coded(self) -> bool:
        """True if the bytes on disk are not the values: other tensors hold scales of them."""
        return False

    def held(self, block: int, *, again: bool = False) -> int:  # noqa: ARG002 - of coded tensors
        """Return the bytes held beside a block of so many elements to decode it, and to code it `again`."""
        return 0

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that hold the tensor."""
        return (self.path,)

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * BITS[self.dtype] // 8

    @property
    def itemsize(self) -> int:
        """Bytes per element, for dtypes of whole bytes."""
        return BITS[self.dtype] // 8

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns): the first dimension by all others; vectors and scalars are one row."""
        if len(self.shape) < 2:
            return (1, self.numel)
        return (self.shape[0], math.prod(self.shape[1:]))


@dataclass(frozen=True)
class Header:
    """The header of one weight file; tensors in the order of their bytes."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check one file's header.

    Raises MalformedError for any fault: a plausible header over the wrong bytes breaks a model silently.
    """
    with open_file(path) as file:
        return parse_header(path, os.fstat(file.fileno()).st_size, file)


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read from its start.

    Raises MalformedError for files that cannot be read, for Git LFS pointers, and for folders and pipes: a
    reader would wait for a pipe forever.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise MalformedError(f"{path} is a {'folder' if path.is_dir() else 'pipe or device'}, not a file.")
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise MalformedError(
                    f"{path} is a Git LFS pointer, not the file itself.", hint="git lfs pull, or download it again"
                )
            file.seek(0)
            yield file
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> MalformedError:
    """Return the error that the system cannot read a file."""
    return MalformedError(f"{path} cannot be read: {error.strerror or error}.", hint=hint_of(error))


def parse_header(path: Path, size: int, file: BinaryIO) -> Header:
    """Parse and check the header of a file of `size` bytes; `file` need not go on after the header."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise MalformedError(
            f"{path} is not a safetensors file: {size} bytes cannot hold a header of {length} bytes.",
            hint="It may be truncated; download it again.",
        )
    entries = _load_json(path, file.read(length))
    metadata = entries.pop("__metadata__", {})
    metadata = {} if metadata is None else metadata
    if not (isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())):
        raise MalformedError(f"{path}: __metadata__ must map strings to strings.")
    unsorted = [_entry(path, 8 + length, name, entry) for name, entry in entries.items()]
    tensors = sorted(unsorted, key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_tiling(path, tensors, 8 + length, size)
    return Header({tensor.name: tensor for tensor in tensors}, metadata)


def _load_json(path: Path, raw: bytes) -> dict[str, Any]:
    """Return the header's JSON, whose numbers are counts; Python's reader alone is less strict.

    The values are counted before they take memory: every value but the first of an object or a list follows
    a comma.
    """
    tensors = raw.count(b"{")
    if tensors > MAX_TENSORS or raw.count(b",") > MAX_VALUES + 8 * tensors:
        raise MalformedError(
            f"{path}: the header has too many entries: more than {MAX_TENSORS} tensors or {MAX_VALUES} other values."
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a key occurs twice")
        return entries

    def count(digits: str) -> int:
        if not digits.isdecimal() or len(digits) > MAX_DIGITS:
            raise ValueError(f"{digits[:30]} is not a number of elements or bytes")
        return int(digits)

    try:
        text = raw.decode()
        header = json.loads(text, object_pairs_hook=unique, parse_int=count, parse_float=count, parse_constant=count)
        if "\\u" in text:  # half a surrogate pair is not a character
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path}: the header is not valid JSON ({error}).") from error
    if not isinstance(header, dict):
        raise MalformedError(f"{path}: the header is not a JSON object.")
    return header


def are_counts(value: object, kind: type[Sequence[Any]] = list) -> TypeGuard[Sequence[int]]:
    """Return True for a list, or another kind of sequence, of numbers of elements or bytes."""
    return isinstance(value, kind) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def is_possible(shape: Sequence[int]) -> bool:
    """Return True if a file can hold a tensor of a shape; empty dimensions count as 1."""
    return len(shape) <= MAX_DIMENSIONS and math.prod(max(1, each) for each in shape) <= MAX_ELEMENTS


def _entry(path: Path, body: int, name: str, entry: Any) -> StoredTensor:
    """Return one header entry as a tensor, checked against its own dtype and shape."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) and len(entry) == 3 else {}
    shape, offsets, dtype = fields.get("shape"), fields.get("data_offsets"), fields.get("dtype")
    if not (are_counts(shape) and are_counts(offsets) and len(offsets) == 2 and isinstance(dtype, str)):
        raise MalformedError(f"{path}: the header entry of {name} is malformed.")
    if dtype not in BITS:
        raise MalformedError(f"{path}: {name} has the unknown dtype {dtype}.")
    if len(shape) > MAX_DIMENSIONS:
        raise MalformedError(f"{path}: {name} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read.")
    tensor = StoredTensor(name, dtype, tuple(shape), path, body + offsets[0])
    if not is_possible(shape) or tensor.numel * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise MalformedError(
            f"{path}: {name} is declared as {dtype} {list(shape)}, which is not {offsets[1] - offsets[0]} bytes."
        )
    return tensor


def _check_tiling(path: Path, tensors: list[StoredTensor], body: int, size: int) -> None:
    """Raise MalformedError unless the tensors cover the file's body without gaps or overlaps."""
    position = body
    for tensor in tensors:
        if tensor.start != position:
            raise MalformedError(f"{path}: {tensor.name} does not start where the tensor before it ends.")
        position += tensor.nbytes
    if position != size:
        raise MalformedError(
            f"{path} is {size} bytes long, but its header describes {position}.",
            hint="The file is truncated or has trailing bytes; download it again.",
        )


def encode_header(tensors: Iterable[Any], metadata: Mapping[str, str] | None = None, prefix: str = "") -> bytes:
    """Return the bytes that open a safetensors file of tensors, or of things like tensors, one after the other.

    Names are written without `prefix`.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        offsets = [position, position := position + tensor.nbytes]
        entries[tensor.name.removeprefix(prefix)] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
