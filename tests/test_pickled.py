"""Files of torch.save, with torch as the oracle: the same tensors, the same bytes, and nothing that runs."""

from __future__ import annotations

import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dora_convert.errors import UnsupportedError
from dora_convert.storage.torch_pickle import read_pickle

from .pickles import DTYPES, REFUSED, STORAGE, agree, call, legacy, names, raw, refused, rezip

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
    tensors = agree(save({"a": whole, "b": whole, "c": whole[3:7], "d": whole[9], "e": whole.view(5, 8)})).tensors
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
    """Attributes that somebody hung on a parameter do not matter."""
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.tag = {"a": [1, 2.5, None, -7, 2**40, 300, "x"]}
    agree(save({"a": parameter, "b": torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)}))


def test_tensors_of_other_devices(save, monkeypatch):
    """The device of a storage is a word in the pickle; the bytes are the same."""
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
    for name in data.draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=9), unique=True, max_size=5)):
        dtype, shape = data.draw(st.sampled_from(DTYPES)), data.draw(st.lists(st.integers(0, 4), max_size=4))
        skip, numel = data.draw(st.integers(0, 3)), torch.Size(shape).numel()
        whole = torch.randint(0, 2, ((skip + numel) * torch.empty(0, dtype=dtype).element_size(),)).to(torch.uint8)
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
    refused(save({"good": torch.ones(2), "bad.weight": tensor}), "'bad.weight'", "view", kind=UnsupportedError)


@pytest.mark.parametrize(
    ("value", "word"),
    [(3, "int"), (2.5, "float"), ("x", "str"), (None, "none"), ([1], "list"), ((1,), "tuple"), ({"b": 1}, "dict")],
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
    """The error names a call that is not on the short list."""
    refused(save({"a": torch.ones(2), "b": value}), *([word] if word else []), kind=REFUSED)


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors(save):
    """torch's own integers with scales."""
    value = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    refused(save({"a": value}), "torch._utils._rebuild_qtensor")


def test_keys_that_are_not_names(save):
    """Nor hashed, since that can crash."""
    refused(save({("a", 1): torch.ones(2)}), "tuple", kind=UnsupportedError)
