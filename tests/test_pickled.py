"""Files of torch.save, with torch as the oracle: the same tensors, the same bytes, and nothing that runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dora_convert import pickled
from dora_convert.errors import MalformedError, UnsupportedError
from dora_convert.pickled import MAGIC, PROTOCOL, read_pickle
from dora_convert.stored import BITS, read_header

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip
REFUSED = (MalformedError, UnsupportedError)


@pytest.fixture(params=["zip", "legacy"])
def save(request, tmp_path):
    """torch.save in one of its two formats; returns the file."""

    def saver(value, name="pytorch_model.bin", **options):
        torch.save(value, tmp_path / name, _use_new_zipfile_serialization=request.param == "zip", **options)
        return tmp_path / name

    saver.format = request.param
    return saver


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


# what is read


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(save, dtype):
    """The oracle is what was saved: torch cannot load the legacy files it writes of its newer dtypes."""
    size = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 2, (6 * size,), dtype=torch.uint8)
    tensors = {"a": data.view(dtype).reshape(2, 3), "b": torch.zeros(3)}
    agree(save(tensors), tensors)


def test_shapes(save):
    """Scalars, empty tensors, and dimensions of size one."""
    agree(
        save(
            {
                "scalar": torch.tensor(2.5), "empty": torch.zeros(0), "none": torch.zeros(3, 0, 2),
                "one": torch.ones(1, 5, 1).transpose(0, 2), "deep": torch.randn(2, 1, 3, 1, 2), "last": torch.arange(9),
                "column": torch.randn(4, 3)[:, :1].contiguous().expand(4, 1), "no column": torch.randn(4, 3)[:, :0],
            }
        )
    )  # fmt: skip


def test_the_empty_dict(save):
    """Nothing is also a state."""
    assert read_pickle(save({})).tensors == {}


def test_shared_storage(save):
    """The same bytes under two names, and views at other offsets."""
    whole = torch.randn(10, 4)
    tensors = agree(
        save({"a": whole, "b": whole, "c": whole[3:7], "d": whole[9], "e": whole.view(5, 8)})
    ).tensors
    assert tensors["a"].start == tensors["b"].start == tensors["e"].start == tensors["c"].start - 3 * 16


def test_offsets_in_untyped_storages(save):
    """Offsets count elements of the tensor, sizes those of the storage: for fp8 both are bytes, for uint16 not."""
    tensors = {"a": torch.arange(12).to(torch.uint16)[4:8], "b": torch.ones(6).to(torch.float8_e5m2)[2:]}
    agree(save(tensors), tensors)


def test_a_module(save):
    """Its state dict is an OrderedDict with an attribute, `_metadata`; parameters can be kept as such."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    assert hasattr(module.state_dict(), "_metadata")
    agree(save(module.state_dict()))
    agree(save(OrderedDict(module.state_dict(keep_vars=True))))


def test_parameters_with_attributes(save):
    """What somebody hung on a parameter does not matter."""
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.tag = {"a": [1, 2.5, None, -7, 2**40, 300, "x"]}
    agree(save({"a": parameter, "b": torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)}))


def test_tensors_of_other_devices(save, monkeypatch):
    """Where the storage was is a word in the pickle; its bytes are the same."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:7")
    path = save({"a": torch.randn(3, 4)})
    assert b"cuda:7" in path.read_bytes()
    agree(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(save, protocol):
    """torch writes protocol 2, and can be told to write newer ones."""
    agree(save({f"layer.{i}": torch.randn(3, i) for i in range(40)}, pickle_protocol=protocol))


def test_rebuild_tensor(tmp_path):
    """The call of the first versions, four arguments."""
    path = legacy(tmp_path, call("torch._utils _rebuild_tensor", STORAGE + b"K\x00K\x03\x85K\x01\x85"))
    agree(path, {"a": torch.zeros(3)})


@pytest.mark.parametrize("name", ["archive.bin", "pytorch_model-00001-of-00002.bin", "a b.pt", "data.bin"])
def test_folder_names(tmp_path, name):
    """The folder in the archive is called like the file, or `archive`."""
    torch.save({"a": torch.randn(3)}, tmp_path / name)
    agree(tmp_path / name)
    with (tmp_path / name).open("wb") as file:
        torch.save({"a": torch.randn(3)}, file)
    agree(tmp_path / name)


def test_many_tensors(save):
    """Enough for long memo indices and several batches of items."""
    agree(save({f"model.layers.{i}.weight": torch.full((2,), i) for i in range(1500)}))


def test_zip64(tmp_path, monkeypatch):
    """Sizes and offsets beyond 4 GiB stand in extra fields."""
    torch.save({"a": torch.randn(30, 4), "b": torch.randn(50)}, tmp_path / "old.bin")
    records = {name: zipfile.ZipFile(tmp_path / "old.bin").read(name) for name in names(tmp_path / "old.bin")}
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    path = rezip(tmp_path / "new.bin", records)
    monkeypatch.undo()
    data = path.read_bytes()
    assert b"PK\x06\x06" in data  # the zip64 end record
    assert any(info.extra[:2] == b"\x01\x00" for info in zipfile.ZipFile(path).infolist())
    agree(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_dict(save, data):
    """Whatever the names, dtypes, shapes and offsets."""
    tensors = {}
    for name in data.draw(
        st.lists(st.text(st.characters(codec="utf-8"), max_size=9), unique=True, max_size=5)
    ):
        dtype, shape = data.draw(st.sampled_from(DTYPES)), data.draw(st.lists(st.integers(0, 4), max_size=4))
        skip, numel = data.draw(st.integers(0, 3)), torch.Size(shape).numel()
        whole = torch.randint(0, 2, ((skip + numel) * torch.empty(0, dtype=dtype).element_size(),)).to(
            torch.uint8
        )
        tensors[name] = whole.view(dtype)[skip:].view(shape)
    path = save(tensors)
    header, written = read_pickle(path), path.read_bytes()
    assert set(header.tensors) == set(tensors)
    for name, tensor in header.tensors.items():
        assert tensor.shape == tensors[name].shape
        assert written[tensor.start : tensor.start + tensor.nbytes] == raw(tensors[name])


# what is refused by name


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).T, torch.randn(6)[::2], torch.randn(3, 1).expand(3, 4), torch.randn(3, 4)[:, :2],
        torch.ones(2, dtype=torch.complex64).conj(), torch._neg_view(torch.ones(2)),
    ],
    ids=["transposed", "strided", "expanded", "columns", "conjugated", "negated"],
)  # fmt: skip
def test_views(save, tensor):
    """Bytes that are not the tensor's elements in order."""
    refused(
        save({"good": torch.ones(2), "bad.weight": tensor}), "'bad.weight'", "view", kind=UnsupportedError
    )


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (3, "int"),
        (2.5, "float"),
        ("x", "str"),
        (None, "none"),
        ([1], "list"),
        ((1,), "tuple"),
        ({"b": 1}, "dict"),
    ],
)
def test_other_values(save, value, word):
    """An entry that is no tensor is named."""
    refused(save({"a": torch.ones(2), "step.count": value}), "'step.count'", word, kind=UnsupportedError)


def test_nested_dicts(save):
    """Training checkpoints keep the weights one level down; the key is named, whatever stands before it."""
    path = save({"epoch": 3, "state_dict": OrderedDict(a=torch.ones(2)), "optimizer": {"state": {0: 1}}})
    error = refused(path, kind=UnsupportedError)
    assert "'state_dict'" in error.message
    assert "'state_dict'" in error.hint


@pytest.mark.parametrize("value", [[torch.ones(2)], torch.ones(2), 3, {0: torch.ones(2)}, {"a": 1, 2: 3}])
def test_other_trees(save, value):
    """Only a dict whose keys are names."""
    refused(save(value), "not hold a dict of names", kind=UnsupportedError)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (torch.ones(2, dtype=torch.complex128), "torch.ComplexDoubleStorage"),
        (torch.ones(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.ones(2, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (torch.float64, None), (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"), ({1, 2}, "__builtin__.set"),
        (b"bytes", "_codecs.encode"), (torch.Size([2]), "torch.Size"), (torch.device("cpu"), "torch.device"),
        (print, "print"),
    ],
    ids=str,
)  # fmt: skip
def test_other_objects(save, value, word):
    """What is not on the short list is named."""
    refused(save({"a": torch.ones(2), "b": value}), *([word] if word else []), kind=REFUSED)


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors(save):
    """torch's own integers with scales."""
    value = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    refused(save({"a": value}), "torch._utils._rebuild_qtensor")


def test_keys_that_are_not_names(save):
    """Nor hashed, since that can crash."""
    refused(save({("a", 1): torch.ones(2)}), "tuple", kind=UnsupportedError)


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
    """What else is called pytorch_model.bin on real disks."""
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
    one, other = (
        zipfile.ZipFile(tmp_path / "x.bin").getinfo(f"x/data/{key}").header_offset for key in (0, 1)
    )
    start = (tmp_path / "x.bin").read_bytes().index(b"PK\x01\x02")
    data = (tmp_path / "x.bin").read_bytes()
    directory = data[start:].replace(struct.pack("<I", one), struct.pack("<I", other))
    (tmp_path / "x.bin").write_bytes(data[:start] + directory)
    refused(tmp_path / "x.bin", "damaged")


# what is hostile: pickles by hand


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
    """What a pickle may name is ours, in the same process as torch as well; none of it can be changed."""
    for name, value in pickled._GLOBALS.items():
        module = value.__module__ if callable(value) else type(value).__module__
        assert module == "dora_convert.pickled", name
        assert callable(value) or isinstance(value, pickled._Dtype)
    assert set(pickled._DTYPES.values()) <= set(BITS)


def test_torch_is_not_imported(save):
    """Neither by the module nor by what a file names."""
    path = save(
        {**{str(dtype): torch.ones(2).to(dtype) for dtype in DTYPES}, "p": torch.nn.Parameter(torch.ones(2))}
    )
    code = (
        "import sys; from pathlib import Path; from dora_convert.pickled import read_pickle\n"
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
        "from pathlib import Path; from dora_convert.errors import *; from dora_convert.pickled import read_pickle\n"
        "try: read_pickle(Path(sys.argv[1]))\n"
        "except (MalformedError, UnsupportedError) as error: sys.stdout.write(error.message)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=True
    )
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
    path = save(
        {"a": weight, "b": weight[1:], "c": torch.ones(2).half(), "d": torch.nn.Parameter(torch.ones(()))}
    )
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(
            st.binary(max_size=6) | st.sampled_from([bytes([byte]) for byte in b"().}]QRtubsecXKJ0"])
        )
        content[place : place + data.draw(st.sampled_from([len(new), 0, 1]))] = new
    path.write_bytes(content)
    try:
        header = read_pickle(path)
    except REFUSED:
        refused(path, kind=REFUSED)
        return
    for name, tensor in header.tensors.items():
        assert name == tensor.name
        assert 0 <= tensor.start <= tensor.start + tensor.nbytes <= len(content)
