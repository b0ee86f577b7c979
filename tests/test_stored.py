"""One broken header, one test, one message; and positional reads."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dora_convert.engine import precision
from dora_convert.engine.precision import read_rows
from dora_convert.errors import MalformedError
from dora_convert.storage import safetensors
from dora_convert.storage.reader import Reader
from dora_convert.storage.safetensors import MAX_HEADER, read_header

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path, header, body=b"\0" * 24, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def test_agrees_with_the_library(tmp_path):
    """Names, shapes, dtypes, metadata and bytes are what the safetensors library says."""
    tensors = {
        "a": torch.randn(3, 5), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "b": torch.ones(7).half(),
        "ints": torch.arange(6).view(2, 3), "flags": torch.tensor([True, False]), "eight": torch.ones(4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "k": "v"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt", "k": "v"}
    reader = Reader()
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert sorted(header.tensors) == sorted(file.keys())
        for name, tensor in header.tensors.items():
            assert list(tensor.shape) == file.get_slice(name).get_shape()
            assert tensor.dtype == file.get_slice(name).get_dtype()
            buffer = memoryview(bytearray(tensor.nbytes))
            reader.read(tensor.path, tensor.start, buffer)
            assert bytes(buffer) == file.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    reader.close()


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({"a": ENTRY}, b"\0" * 23, "describes"),
        ({"a": ENTRY}, b"\0" * 25, "describes"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [28, 52]}}, b"\0" * 52, "does not start"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [20, 44]}}, b"\0" * 44, "does not start"),
        ({"a": {**ENTRY, "shape": [2, 4]}}, b"\0" * 24, "which is not 24 bytes"),
        ({"a": {**ENTRY, "dtype": "F31"}}, b"\0" * 24, "unknown dtype"),
        ({"a": {**ENTRY, "shape": [-2, -3]}}, b"\0" * 24, "malformed"),
        ({"a": {**ENTRY, "shape": "2,3"}}, b"\0" * 24, "malformed"),
        ({"a": {**ENTRY, "shape": [2.0, 3]}}, b"\0" * 24, "malformed"),
        ({"a": {**ENTRY, "shape": [True, 6]}}, b"\0" * 24, "malformed"),
        ({"a": {**ENTRY, "data_offsets": [24, 0]}}, b"\0" * 24, "which is not"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, b"\0" * 24, "malformed"),
        ({"a": {"dtype": "F32"}}, b"\0" * 24, "malformed"),
        ({"a": 3}, b"", "malformed"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({"__metadata__": "x"}, b"", "__metadata__"),
        ([1, 2], b"", "not a JSON object"),
        (b"{", b"", "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b"[" * 200_000, b"", "not valid JSON"),
        ({"a": {**ENTRY, "shape": [2**62, 2**62]}}, b"\0" * 24, "which is not"),
    ],
)
def test_malformed_header(tmp_path, header, body, message):
    """Each way to be malformed has its message, and names the file."""
    path = write(tmp_path / "x.safetensors", header, body)
    with pytest.raises(MalformedError, match=message) as caught:
        read_header(path)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [10**6, MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_header_bomb(tmp_path, length):
    """A declared length beyond the file, or beyond the format's limit, is not read."""
    with pytest.raises(MalformedError, match="cannot hold a header"):
        read_header(write(tmp_path / "x.safetensors", {}, length=length))


@pytest.mark.parametrize(
    "data", [b"", b"\0\0\0", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"]
)
def test_not_a_safetensors_file(tmp_path, data):
    """Empty files, stubs, and Git LFS pointers."""
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(MalformedError) as caught:
        read_header(tmp_path / "x.safetensors")
    assert ("git lfs pull" in (caught.value.hint or "")) == (b"git-lfs" in data)


def test_missing_file(tmp_path):
    """A file that is not there is said to be unreadable."""
    with pytest.raises(MalformedError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_pass_for_a_file_that_the_library_refuses(tmp_path_factory, data):
    """Whatever we accept, the safetensors library accepts; we raise nothing but MalformedError."""
    path = tmp_path_factory.mktemp("random") / "x.safetensors"
    path.write_bytes(data)
    try:
        read_header(path)
    except MalformedError:
        return
    with safe_open(path, "pt"):
        pass


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_one_changed_byte(tmp_path_factory, data):
    """A good file with one byte of its header changed is refused, or read as the library reads it."""
    path = tmp_path_factory.mktemp("changed") / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path, {"format": "pt"})
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except MalformedError:
        return
    with safe_open(path, "pt") as file:
        assert sorted(header.tensors) == sorted(file.keys())
        assert [list(header.tensors[name].shape) for name in file.keys()] == [  # noqa: SIM118
            file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118
        ]


def test_reader_sees_a_truncated_file(tmp_path):
    """A file that shrinks while it is read is an error, not short data."""
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    reader = Reader()
    with pytest.raises(MalformedError, match="shorter"):
        reader.read(path, 3, memoryview(bytearray(4)))
    reader.close()


def test_the_library_refuses_what_we_refuse(tmp_path):
    """The strictness is the format's: gaps and trailing bytes are errors there, too."""
    path = write(tmp_path / "x.safetensors", {"a": ENTRY}, b"\0" * 25)
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass


def test_reads_near_rows_at_once(tmp_path, monkeypatch):
    """Scattered rows of a small tensor come in one read, those of a large one in a read for each run; the same rows."""
    tensor = torch.randn(64, 8)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors").tensors["x"]
    reader, reads, gather = Reader(), [], Reader.gather
    monkeypatch.setattr(
        Reader, "gather", lambda self, path, runs, data: (reads.append(len(runs)), gather(self, path, runs, data))[1]
    )
    rows = [3, 4, 9, 33, 60]
    assert torch.equal(read_rows(reader, stored, rows), tensor[rows])
    monkeypatch.setattr(precision, "NEAR_BYTES", 256)
    assert torch.equal(read_rows(reader, stored, rows), tensor[rows])
    assert reads == [1, 4]


def test_blanks_in_a_header_cost_nothing(monkeypatch):
    """A header that Python's json wrote is parsed as quickly as one without blanks; twice the same key is refused."""
    values = {"__metadata__": {"format": "pt", "a": "b"}, "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    text = json.dumps(values)
    for header in (text, json.dumps(values, separators=(",", ":"))):
        entries, metadata = safetensors._quickly_parsed(header.encode())
        assert (list(entries), metadata) == (["x"], {"format": "pt", "a": "b"})
    for twice in (
        text.replace('"a"', '"format"'),
        text.replace('"a"', r'"form\u0061t"'),
        text.replace('"b"', r'"\u0062"'),
    ):
        assert safetensors._quickly_parsed(twice.encode()) is None


@pytest.mark.parametrize("value", ['{"a": "}, {"}', "a\\b", "x" * safetensors.LONG_METADATA])
def test_metadata_may_be_any_text(tmp_path, value):
    """Braces, quotes and backslashes in metadata do not end it, and long metadata are read with a closer look."""
    tensors = {"x": torch.arange(3)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "text": value})
    header = read_header(tmp_path / "x.safetensors")
    assert (list(header.tensors), header.metadata) == (["x"], {"format": "pt", "text": value})


def test_metadata_anywhere(tmp_path):
    """Metadata after the tensors count; a comma with nothing behind it is refused; a tensor may come twice nowhere."""
    entry = '"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    metadata = '"__metadata__":{"format":"pt"}'
    path = write(tmp_path / "x.safetensors", f"{{{entry},{metadata}}}".encode(), b"\0")
    assert read_header(path).metadata == {"format": "pt"}
    for wrong in (f"{{{metadata},}}", f"{{{metadata},{entry},{entry}}}", f"{{{metadata},{metadata},{entry}}}"):
        with pytest.raises(MalformedError):
            read_header(write(path, wrong.encode(), b"\0"))
