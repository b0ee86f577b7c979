"""Pickles of tensors, by torch.save and by hand, and what must be read of them."""

from __future__ import annotations

import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from dora_convert.errors import MalformedError, UnsupportedError
from dora_convert.storage.safetensors import read_header
from dora_convert.storage.torch_pickle import MAGIC, PROTOCOL, read_pickle

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x03NtQ"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(name, arguments):
    module, name = name.split()
    return f"c{module}\n{name}\n".encode() + b"(" + arguments + b"tR"


def legacy(tmp_path, value, pairs=None, storages=None):
    """A legacy file whose dict has one entry, `a`, and one storage of three floats if the entry has."""
    if storages is None:
        storages = ["0"] if b"storage" in value + (pairs or b"") else []
    head = b"".join(pickle.dumps(it, 2) for it in (MAGIC, PROTOCOL, {"little_endian": True}))
    body = b"\x80\x02}" + (text("a") + value + b"s" if pairs is None else pairs) + b"."
    path = tmp_path / "hand.bin"
    path.write_bytes(
        head + body + pickle.dumps(list(storages), 2) + b"".join(struct.pack("<q12x", 3) for _ in storages)
    )
    return path


def tensor(shape=b"K\x03\x85", stride=b"K\x01\x85", offset=b"K\x00", storage=STORAGE):
    return call("torch._utils _rebuild_tensor", storage + offset + shape + stride)


def names(path):
    return zipfile.ZipFile(path).namelist()


def contents(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezip(path, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return path


def swap(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


REFUSED = (MalformedError, UnsupportedError)


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def agree(path, expected=None):
    """Names, dtypes, shapes and bytes are what torch.load says, dtypes in the words of safetensors."""
    expected = expected or torch.load(path, map_location="cpu", weights_only=False)
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in expected.items()}
    save_file(copies, path.with_suffix(".safetensors"))
    told = read_header(path.with_suffix(".safetensors")).tensors
    header, data = read_pickle(path), path.read_bytes()
    assert header.metadata == {}
    assert set(header.tensors) == set(expected)
    for name, tensor in header.tensors.items():
        assert (tensor.name, tensor.path) == (name, path)
        assert (tensor.dtype, tensor.shape) == (told[name].dtype, told[name].shape)
        assert data[tensor.start : tensor.start + tensor.nbytes] == raw(expected[name])
        assert 0 <= tensor.start <= tensor.start + tensor.nbytes <= len(data)
    starts = [tensor.start for tensor in header.tensors.values()]
    assert starts == sorted(starts)
    return header


def refused(path, *parts, kind=MalformedError):
    """Refused with a message of at most two lines, which names the file and has these parts."""
    with pytest.raises(kind) as caught:
        read_pickle(path)
    assert type(caught.value) in REFUSED
    text = f"{caught.value.message} {caught.value.hint or ''}"
    for part in (str(path), *parts):
        assert part in text
    assert len(caught.value.message.splitlines()) == 1
    assert len((caught.value.hint or "").splitlines()) <= 1
    return caught.value
