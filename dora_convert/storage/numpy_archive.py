r"""Locate the arrays in a .npz file: a zip archive of .npy files, which numpy and MLX write without compression.

A .npy file is `\x93NUMPY`, two bytes of version, the header's length, and a Python dict of three entries: the
dtype (`descr`), the order of the axes (`fortran_order`), and the shape. The array's bytes follow.
"""

from __future__ import annotations

import ast
import struct
import zipfile
from pathlib import Path
from typing import Any

from ..errors import MalformedError, UnsupportedError, shown
from .safetensors import Header, StoredTensor, is_possible, open_file
from .strict_header import are_counts

MAGIC = b"\x93NUMPY"
MOST_HEADER = 1 << 16
DTYPES = {"<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "|u1": "U8", "|b1": "BOOL"}


def read_npz(path: Path) -> Header:
    """Return the arrays as tensors, by their names without `.npy`; MalformedError for anything else."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            tensors = [_array(path, archive, info) for info in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, struct.error, SyntaxError, RecursionError, EOFError) as error:
        raise MalformedError(f"{path} is not a valid .npz file.", hint="download it again") from error
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise MalformedError(f"{path} has a name twice.")
    return Header({tensor.name: tensor for tensor in tensors}, {})


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredTensor:
    """Return one array's place in the file."""
    name = info.filename.removesuffix(".npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise UnsupportedError(f"{path}: {shown(name)} is compressed.", hint="save it with numpy.savez")
    with archive.open(info) as member:
        if member.read(len(MAGIC)) != MAGIC:
            raise ValueError("not an array")
        wide = member.read(2)[0] > 1
        (length,) = struct.unpack("<I" if wide else "<H", member.read(4 if wide else 2))
        if length > MOST_HEADER:
            raise ValueError("the header is too long")
        fields = ast.literal_eval(member.read(length).decode("latin-1").strip())
        start = member.tell()
    tensor = StoredTensor(name, *_kind(path, name, fields), path, _content(path, info) + start)
    if start + tensor.nbytes != info.file_size:
        raise ValueError("the array has another size than its header says")
    return tensor


def _kind(path: Path, name: str, fields: Any) -> tuple[str, tuple[int, ...]]:
    """Return an array's dtype and shape."""
    shape, dtype = fields["shape"], DTYPES.get(fields["descr"])
    if not are_counts(shape, tuple) or not is_possible(shape):
        raise ValueError("not a shape")
    if not dtype or (fields["fortran_order"] and len(shape) > 1):
        raise UnsupportedError(f"{path}: {shown(name)} is stored as {fields['descr']}, or column after column.")
    return dtype, tuple(shape)


def _content(path: Path, info: zipfile.ZipInfo) -> int:
    """Return the first byte of a member's content."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return int(info.header_offset + 30 + name + extra)
