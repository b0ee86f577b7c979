"""Read and write the headers of safetensors files, strictly.

The format: eight bytes with the header's length N (little endian), N bytes of JSON, then the tensors' bytes
without gaps. Each JSON entry holds `dtype`, `shape` and `data_offsets` relative to the end of the header;
`__metadata__` holds strings. A header is at most 100 MB.

The safetensors library reads the same header, but keeps the offsets to itself and maps whole files into
memory, which is why this file exists: merges are planned from headers and read in blocks.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar

import msgspec

from ..errors import MalformedError, hint_of
from ..records import record

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
MAX_ELEMENTS = 2**60
Natural = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
"""A number of elements or bytes."""
LFS_POINTER = b"version https://git-lfs"


@record(frozen=True, slots=True)
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


def files_of(tensors: Iterable[StoredTensor]) -> set[Path]:
    """Return the files that hold tensors; those of one file share its path, which takes long to hash."""
    return set({id(tensor.path): tensor.path for tensor in tensors}.values())


class HeaderEntry(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The entry of one tensor in a header."""

    dtype: str
    shape: tuple[Natural, ...]
    data_offsets: tuple[Natural, Natural]
    """The first byte and the byte after the last, from the end of the header."""


_DECODER = msgspec.json.Decoder(dict[str, HeaderEntry])
_METADATA = re.compile(rb'\{"__metadata__": ?(\{[^"}]*(?:"[^"\\]*(?:\\.[^"\\]*)*"[^"}]*)*\})(?:, ?(?=")|(?=\}))')
"""The beginning of a header that has metadata, up to the first tensor's name."""
LONG_METADATA = 1 << 20
"""Longer metadata need a closer look: the expression would take memory."""


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
    raw = file.read(length)
    _refuse_many(path, raw)
    if not (parsed := _quickly_parsed(raw)):
        from .strict_header import parse_strictly

        values, metadata = parse_strictly(path, raw)
        parsed = {name: HeaderEntry(*value) for name, value in values.items()}, metadata
    entries, metadata = parsed
    return Header(_placed(path, entries, 8 + length, size), metadata)


def _quickly_parsed(raw: bytes) -> tuple[dict[str, HeaderEntry], dict[str, str]] | None:
    """Parse a header as every library writes it; return None for another one, which needs a closer look."""
    begun = _METADATA.match(raw, 0, LONG_METADATA)
    written, rest = (begun[1], b"{" + raw[begun.end() :]) if begun else (b"{}", raw)
    try:
        metadata = msgspec.json.decode(written, type=dict[str, str])
        entries = _DECODER.decode(rest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    # msgspec takes the last of equal keys, and an escape may hide one: all quotes must be those of keys and texts
    escapes, quotes = written.count(b"\\"), written.count(b'"')
    plain = not escapes and quotes == 4 * len(metadata)  # with blanks or without
    once = raw.count(b'"') == 10 * len(entries) + (quotes + 2 if begun else 0)
    known = once and raw.count(b"\\") == escapes and (plain or msgspec.json.encode(metadata) == written)
    return (entries, metadata) if known else None


def _refuse_many(path: Path, raw: bytes) -> None:
    """Raise MalformedError for more values than a model has, before they take memory.

    Every value but the first of an object or a list follows a comma.
    """
    tensors = raw.count(b"{")
    if tensors > MAX_TENSORS or raw.count(b",") > MAX_VALUES + 8 * tensors:
        raise MalformedError(
            f"{path}: the header has too many entries: more than {MAX_TENSORS} tensors or {MAX_VALUES} other values."
        )


def is_possible(shape: Sequence[int]) -> bool:
    """Return True if a file can hold a tensor of a shape; empty dimensions count as 1."""
    numel = math.prod(shape) or math.prod(max(1, each) for each in shape)
    return len(shape) <= MAX_DIMENSIONS and numel <= MAX_ELEMENTS


def _placed(path: Path, entries: Mapping[str, HeaderEntry], body: int, size: int) -> dict[str, StoredTensor]:
    """Return the tensors of a header in the order of their bytes.

    Raises MalformedError unless they cover the file of `size` bytes from `body` on, without gaps or overlaps.
    """
    tensors: dict[str, StoredTensor] = {}
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    """The bytes of a tensor by dtype and shape, of which a file with many tensors has few."""
    position, ordered, offsets = 0, [*entries.items()], [entry.data_offsets for entry in entries.values()]
    if offsets != sorted(offsets):
        ordered.sort(key=lambda each: each[1].data_offsets)
    for name, entry in ordered:
        kind, (first, last) = (entry.dtype, entry.shape), entry.data_offsets
        if sizes.get(kind) != last - first:
            sizes[kind] = _checked_size(path, name, entry)
        if first != position:
            raise MalformedError(f"{path}: {name} does not start where the tensor before it ends.")
        tensors[name] = StoredTensor(name, *kind, path, body + first)
        position = last
    if body + position != size:
        raise MalformedError(
            f"{path} is {size} bytes long, but its header describes {body + position}.",
            hint="The file is truncated or has trailing bytes; download it again.",
        )
    return tensors


def _checked_size(path: Path, name: str, entry: HeaderEntry) -> int:
    """Return the bytes of a tensor, which are those of its dtype and shape."""
    dtype, shape, (first, last) = entry.dtype, entry.shape, entry.data_offsets
    if dtype not in BITS:
        raise MalformedError(f"{path}: {name} has the unknown dtype {dtype}.")
    if len(shape) > MAX_DIMENSIONS:
        raise MalformedError(f"{path}: {name} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read.")
    numel = math.prod(shape)
    if numel * BITS[dtype] != 8 * (last - first) or not (0 < numel <= MAX_ELEMENTS or is_possible(shape)):
        raise MalformedError(f"{path}: {name} is declared as {dtype} {list(shape)}, which is not {last - first} bytes.")
    return last - first


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
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
