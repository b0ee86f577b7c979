"""Files around a pickle: byte orders, archives, what is cut off or is something else."""

from __future__ import annotations

import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from dora_convert.errors import MalformedError, UnsupportedError
from dora_convert.storage.safetensors import read_header
from dora_convert.storage.torch_pickle import MAGIC

from .pickles import agree, contents, refused, rezip, swap


def test_big_endian(save):
    """The bytes would have to be swapped."""
    path = save({"a": torch.ones(2)})
    if save.format == "zip":
        rezip(path, {**contents(path), "pytorch_model/byteorder": b"big"})
    else:
        swap(path, b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    refused(path, "big-endian", kind=UnsupportedError)


def test_without_a_byteorder(tmp_path):
    """torch before 2.0 did not say: little."""
    torch.save({"a": torch.randn(2)}, tmp_path / "a.bin")
    records = contents(tmp_path / "a.bin")
    del records["a/byteorder"]
    agree(rezip(tmp_path / "a.bin", records))


def test_compressed_records(tmp_path):
    """Somebody repacked it; there is no way to read rows of it."""
    torch.save({"a": torch.ones(200)}, tmp_path / "a.bin")
    path = rezip(tmp_path / "a.bin", contents(tmp_path / "a.bin"), zipfile.ZIP_DEFLATED)
    refused(path, "compressed", kind=UnsupportedError)


# what is broken


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "0 bytes"), (b"hello, this is text\n" * 9, "torch.save"), (b"P", "torch.save"), (b"\x80", "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (b"PK\x03\x04", "damaged"), (b"PK\x05\x06" + bytes(18), "torch.save"), (b"\x1f\x8b\x08", "torch.save"),
        (b"\x80\x02.", "damaged"), (b"\x80\x02K\x01.", "not one that torch.save wrote"), (bytes(100), "torch.save"),
        (pickle.dumps({"a": 1}), "not one that torch.save wrote"), (pickle.dumps(MAGIC), "damaged"),
    ],
)  # fmt: skip
def test_other_files(tmp_path, content, part):
    """Other files that are called pytorch_model.bin on real disks."""
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    refused(tmp_path / "pytorch_model.bin", part)


def test_the_same_words_for_git_lfs(tmp_path):
    """One message for both formats."""
    (tmp_path / "x.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(MalformedError) as caught:
        read_header(tmp_path / "x.bin")
    error = refused(tmp_path / "x.bin")
    assert (error.message, error.hint) == (caught.value.message, caught.value.hint)


def test_safetensors(tmp_path):
    """It only bears the wrong name."""
    save_file({"a": torch.ones(2)}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "rename")


def test_no_file(tmp_path):
    """Nor a folder."""
    refused(tmp_path / "absent.bin", "No such file")
    refused(tmp_path, "is a folder")


def test_every_truncation(save):
    """Wherever a download stops."""
    path = save({"a": torch.randn(40), "b": torch.ones(3, dtype=torch.int8), "c": torch.zeros(0)})
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        refused(path)


def test_trailing_bytes(save):
    """A zip archive may not end in anything else either."""
    path = save({"a": torch.randn(4)})
    path.write_bytes(path.read_bytes() + bytes(70_000))
    refused(path)


def test_other_archives(tmp_path):
    """No data.pkl, two of them, or one too deep."""
    for records in (
        {}, {"a.txt": b"x"}, {"data.pkl": b"x"}, {"a/data.pkl": b"x", "b/data.pkl": b"x"}, {"a/b/data.pkl": b"x"},
        {"a/xdata.pkl": b"x"},
    ):  # fmt: skip
        refused(rezip(tmp_path / "x.bin", records), "zip archive" if records else "torch.save")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("record", ["x/data/0", "x/data.pkl", "x/byteorder"])
def test_records_that_occur_twice(tmp_path, record):
    """Which of them counts would depend on the reader."""
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin", "a") as archive:
        archive.writestr(record, zipfile.ZipFile(tmp_path / "x.bin").read(record))
    refused(tmp_path / "x.bin", "zip archive")


@pytest.mark.parametrize("record", [None, b"", bytes(15)])
def test_missing_and_short_records(tmp_path, record):
    """Sixteen bytes are needed."""
    torch.save({"a": torch.ones(4)}, tmp_path / "x.bin")
    records = contents(tmp_path / "x.bin")
    del records["x/data/0"]
    records |= {} if record is None else {"x/data/0": record}
    refused(rezip(tmp_path / "x.bin", records), "storage '0'", "too short")


def test_damaged_pickle_in_an_archive(tmp_path):
    """The archive's checksum notices what would otherwise be another name."""
    torch.save({"some.name": torch.ones(4)}, tmp_path / "x.bin")
    swap(tmp_path / "x.bin", b"some.name", b"same.name")
    refused(tmp_path / "x.bin", "damaged")


def test_records_in_other_places(tmp_path):
    """The directory says where a record is, and the record must agree."""
    torch.save({"a": torch.ones(4), "b": torch.zeros(4)}, tmp_path / "x.bin")
    one, other = (zipfile.ZipFile(tmp_path / "x.bin").getinfo(f"x/data/{key}").header_offset for key in (0, 1))
    start = (tmp_path / "x.bin").read_bytes().index(b"PK\x01\x02")
    data = (tmp_path / "x.bin").read_bytes()
    directory = data[start:].replace(struct.pack("<I", one), struct.pack("<I", other))
    (tmp_path / "x.bin").write_bytes(data[:start] + directory)
    refused(tmp_path / "x.bin", "damaged")
