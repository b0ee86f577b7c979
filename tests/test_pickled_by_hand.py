"""Pickles that torch.save does not write: names of code, broken storages, bombs. Nothing of them is run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dora_convert.errors import MalformedError, UnsupportedError
from dora_convert.storage import torch_pickle as pickled
from dora_convert.storage.safetensors import BITS
from dora_convert.storage.torch_pickle import MAGIC, PROTOCOL, read_pickle

from .pickles import DTYPES, REFUSED, STORAGE, agree, call, legacy, refused, tensor, text

# what is hostile: pickles by hand


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_code_does_not_run(save, tmp_path):
    """Not as a value, not as the whole, and not after good tensors; the oracle shows that the file is armed."""
    marker = tmp_path / "marker"
    for value in (Evil(marker), {"a": torch.ones(2), "b": Evil(marker)}, {"a": [{"b": (Evil(marker),)}]}):
        path = save(value)
        refused(path, "system", "safetensors")
        assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_code_in_every_pickle_of_a_legacy_file(tmp_path):
    """There are five."""
    marker = tmp_path / "marker"
    good = [MAGIC, PROTOCOL, {"little_endian": True}, {}, []]
    for place in range(5):
        values = [Evil(marker) if i == place else value for i, value in enumerate(good)]
        (tmp_path / "x.bin").write_bytes(b"".join(pickle.dumps(value, 2) for value in values))
        refused(tmp_path / "x.bin", "system")
        assert not marker.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(X\x07\x00\x00\x00touch MtR", b"(X\x07\x00\x00\x00touch Mios\nsystem\n",
        b"(cos\nsystem\nX\x07\x00\x00\x00touch Mo", b"\x8c\x02os\x8c\x06system\x93(X\x07\x00\x00\x00touch MtR",
        b"cbuiltins\neval\n", b"c__builtin__\neval\n", b"cposix\nsystem\n", b"ctorch\nload\n", b"ctorch.hub\nload\n",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", b"ccollections\nOrderedDict.fromkeys\n", b"c\n\n",
        b"cos system\n\n", b"ccollections OrderedDict\n\n", b"\x82\x01", b"Ptorch\n", b"N\x81", b"\x97", b"S'\\q'\n",
    ],
)  # fmt: skip
def test_ways_to_name_code(tmp_path, code):
    """Globals in all spellings, instances, extensions."""
    refused(legacy(tmp_path, code))


def test_nothing_named_is_torch():
    """The names that a pickle may use are ours, also in a process with torch, and none of them can be changed."""
    for name, value in pickled._GLOBALS.items():
        module = value.__module__ if callable(value) else type(value).__module__
        assert module == "dora_convert.storage.torch_pickle", name
        assert callable(value) or isinstance(value, pickled._Dtype)
    assert set(pickled._DTYPES.values()) <= set(BITS)


def test_torch_is_not_imported(save):
    """Neither by the module nor by what a file names."""
    path = save({**{str(dtype): torch.ones(2).to(dtype) for dtype in DTYPES}, "p": torch.nn.Parameter(torch.ones(2))})
    code = (
        "import sys; from pathlib import Path; from dora_convert.storage.torch_pickle import read_pickle\n"
        "found = read_pickle(Path(sys.argv[1])).tensors\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules), 'imported'\n"
        "sys.stdout.write(str(len(found)))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == str(len(DTYPES) + 1)


@pytest.mark.parametrize(
    "value",
    [
        tensor(shape=b"K\x04\x85"), tensor(offset=b"K\x01"), tensor(offset=b"J\xff\xff\xff\xff"), tensor(offset=b"N"),
        tensor(shape=b"K\x03"), tensor(shape=b"J\xfd\xff\xff\xff\x85"), tensor(shape=b"G" + bytes(8) + b"\x85"),
        tensor(shape=b"\x88\x85"), tensor(stride=b"K\x01K\x01\x86"), tensor(stride=b"N"), tensor(storage=b"N"),
        tensor(storage=STORAGE.replace(b"FloatStorage", b"float99")), tensor(storage=b"K\x03Q"), b"NQ", b")Q", b"NNR", b"N)R",
        tensor(storage=STORAGE.replace(b"K\x03N", b"J\xff\xff\xff\xffN")), tensor(storage=STORAGE.replace(b"NtQ", b")tQ")),
        tensor(storage=STORAGE.replace(b"K\x03N", b"NN")), call("torch._utils _rebuild_tensor", b""),
        tensor(shape=b"\x8a\xff" + b"\x7f" * 255 + b"\x85"), tensor(shape=b"(" + b"K\x01" * 65 + b"t", stride=b"(" + b"K\x01" * 65 + b"t"),
        tensor(shape=b"(" + (b"\x8a\x08" + b"\xff" * 7 + b"\x7f") * 60 + b"t", stride=b"(" + b"K\x01" * 60 + b"t"),
        call("torch._utils _rebuild_tensor_v3", STORAGE + b"K\x00K\x03\x85K\x01\x85\x89}K\x05"),
        call("torch._utils _rebuild_parameter", b"N\x89}"), call("collections OrderedDict", b"}"),
        tensor() + tensor(storage=STORAGE.replace(b"Float", b"Int")), b"t", b"u", b"h\x07", b"b", b"s", b"a", b"e", b"Nb", b"(u", b"(Nu", b"N(", b"NN",
        b"((ue", b"]Nb(e", b"\x85", b"0", b"1", b"2", b"\x8f", b"C\x01a", b"I1\n", b"F1\n", b"\xff", b"\x8a\x01", b"X\xff\xff\xff\xff",
        b"r\xff\xff\xff\xff", b"\x95" + b"\xff" * 8, b"\x8d" + b"\xff" * 8, b"\x8b\xff\xff\xff\xff", b"X\x01\x00\x00\x00\xff",
    ],
)  # fmt: skip
def test_broken_pickles(tmp_path, value):
    """Each is one thing that torch.save never writes."""
    refused(legacy(tmp_path, value), kind=REFUSED)


def test_the_file_by_hand_is_good(tmp_path):
    """Else the tests of broken ones would prove nothing."""
    agree(legacy(tmp_path, tensor()), {"a": torch.zeros(3)})


def test_names_that_occur_twice(tmp_path):
    """Python would let the last one win."""
    pairs = b"(" + (text("a") + tensor()) * 2 + b"u"
    refused(legacy(tmp_path, b"", pairs), "'a' occurs twice")


def test_storages_that_do_not_match(tmp_path):
    """The list after the dict is the order of the bytes."""
    for storages in ((), ("0", "0"), ("1",), ("0", "1")):
        refused(legacy(tmp_path, tensor(), storages=storages), "storages")
    path = legacy(tmp_path, tensor())
    path.write_bytes(path.read_bytes()[:-20] + struct.pack("<q12x", 4))
    refused(path, "storage '0'")


def test_names_of_any_kind(tmp_path):
    """A message stays one line, and short, whatever a name holds."""
    for name in ("a\nb\r\x1b[31m", "x" * 100_000):
        error = refused(legacy(tmp_path, b"", text(name) + b"Ns"), kind=UnsupportedError)
        assert len(error.message) < 1000


@pytest.mark.parametrize(
    "bomb",
    [
        b")" + b"\x85" * 300_000 + b"Ns", b"]" * 300_000, b"(" * 300_000, b"}" * 100_000 + b"Ns" * 10, b"Nr\xff\xff\xff\xff",
        b")" + b"\x85" * 300_000 + b"Q", b")" + b"\x85" * 300_000 + b"N\x93", tensor(shape=b")" + b"\x85" * 300_000),
        text("a") + b")" + b"\x85" * 300_000 + b"s", text("a") + b"]" + b"]a" * 9, text("a") + b"}q\x01" + text("b") + b"h\x01ssN",
        text("a") + b"]q\x01h\x01as",
    ],
)  # fmt: skip
def test_bombs(tmp_path, bomb):
    """Depth, breadth, memo indices and cycles cost what the pickle is long; in a process of their own, for crashes."""
    path = legacy(tmp_path, b"", bomb)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from pathlib import Path; from dora_convert.errors import *; from dora_convert.storage.torch_pickle import read_pickle\n"
        "try: read_pickle(Path(sys.argv[1]))\n"
        "except (MalformedError, UnsupportedError) as error: sys.stdout.write(error.message)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=True)
    assert str(path) in done.stdout


def test_long_pickles(save, monkeypatch):
    """A limit holds for both formats."""
    path = save({f"name.{i}": torch.ones(1) for i in range(40)})
    monkeypatch.setattr(pickled, "MAX_PICKLE", 1000)
    refused(path, kind=MalformedError)


def test_tensors_are_not_read(save, monkeypatch):
    """Only what lies around them."""
    path, seen = save({"a": torch.ones(5_000_000), "b": torch.ones(2)}), []

    class Spy(io.BufferedReader):
        def read(self, count=-1):
            seen.append(data := super().read(count))
            return data

    opened = type(path).open
    monkeypatch.setattr(type(path), "open", lambda self, mode: Spy(opened(self, mode, buffering=0)))
    assert len(read_pickle(path).tensors) == 2
    assert 0 < sum(map(len, seen)) < 100_000


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations(save, data):
    """Any file gives tensors that lie in it, or one of two errors."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3)
    path = save({"a": weight, "b": weight[1:], "c": torch.ones(2).half(), "d": torch.nn.Parameter(torch.ones(()))})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.binary(max_size=6) | st.sampled_from([bytes([byte]) for byte in b"().}]QRtubsecXKJ0"]))
        content[place : place + data.draw(st.sampled_from([len(new), 0, 1]))] = new
    path.write_bytes(content)
    try:
        header = read_pickle(path)
    except REFUSED:
        refused(path, kind=REFUSED)
        return
    for name, found in header.tensors.items():
        assert name == found.name
        assert 0 <= found.start <= found.start + found.nbytes <= len(content)
