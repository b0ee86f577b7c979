"""What a stranger's model may bring along: records and journals that lead elsewhere, or ask for more than there is."""

from __future__ import annotations

import json
import struct
import tracemalloc
from contextlib import closing

import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import DoraConvertError, MalformedError
from dora_convert.storage.json_files import Count, Dtype, Real, checked
from dora_convert.storage.reader import Reader
from dora_convert.storage.safetensors import StoredTensor
from dora_convert.undo.packing import Unpacker, pack

from .toy import contents, edit_json, make_adapter, stopped

RECEIPT, UNDO = "dora_convert/receipt.json", "dora_convert/undo.safetensors"
OUTSIDE = ("../outside", "/outside", "a/../../outside", "..", "", "a\\..\\b", "a\0b", "\ud800")


@pytest.fixture
def merged(tmp_path, base, adapter):
    """An exact merge of a DoRA."""
    dora_convert.merge(base.path, adapter, tmp_path / "models/merged", undo="exact")
    return tmp_path / "models/merged"


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("field", ["base_files", "side_files", "index", "shards"])
def test_receipts_name_files_inside(tmp_path, merged, adapter, field, name):
    """A file that would be written, read or removed anywhere else is refused before anything is."""
    receipt = json.loads((merged / RECEIPT).read_text())
    if field == "index":
        receipt["layout"]["index"] = name
    elif field == "shards":
        receipt["layout"]["shards"][0]["name"] = name
    else:
        receipt[field][name] = "copied" if field == "side_files" else None
        tensors = load_file(merged / UNDO) | {f"file/{name}": torch.ones(3, dtype=torch.uint8)}
        if "\ud800" not in name:
            save_file(tensors, merged / UNDO)
    (merged / RECEIPT).write_text(json.dumps(receipt))
    (tmp_path / "models/outside").write_text("somebody's")
    before = contents(tmp_path)
    for options in ({"out": tmp_path / "again"}, {"in_place": True}):
        with pytest.raises(MalformedError, match=r"is not a valid receipt|half of a character"):
            dora_convert.unmerge(merged, adapter, **options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("field", ["staged", "removed"])
def test_journals_name_files_inside(tmp_path, base, adapter, field, name):
    """So is a journal that came with a folder, whose end says what to put in place and what to remove."""
    last = {"staged": [], "removed": [], "report": {"command": "merge", "adapters": [adapter.name]}}
    place = base.path / ".dora-convert-in-place"
    (place / "new").mkdir(parents=True)
    (place / "journal.jsonl").write_text('{"a": "key"}\n' + json.dumps(last | {field: [name]}) + "\n")
    (tmp_path / "outside").write_text("somebody's")
    (place / "outside").write_text("somebody's")
    before = contents(tmp_path)
    with pytest.raises(MalformedError, match="is damaged"):
        dora_convert.merge(base.path, adapter, in_place=True)
    assert {name: data for name, data in contents(tmp_path).items() if ".lock" not in name} == before


FRAME = zstandard.ZstdCompressor().compress
HUGE = b"\x28\xb5\x2f\xfd\xc0\x00" + struct.pack("<Q", 1 << 40)  # a frame's head that promises a terabyte


def block(values, kept, *frames):
    """A packed block that says what it likes of itself."""
    body = struct.pack(f"<IIB{len(frames)}I", values, kept, len(frames), *map(len, frames)) + b"".join(frames)
    return struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "data",
    [
        block(2**32 - 1, 0),
        block(2**32 - 1, 2**32 - 1, FRAME(b"x"), FRAME(b"x")),
        block(0, 0) * 1000,
        block(50, 2**32 - 1, HUGE, HUGE),
        block(50, 2**32 - 1, FRAME(bytes(1 << 24)), FRAME(bytes(50))),
        block(50, 50, FRAME(bytes(50)), FRAME(bytes(50))),
        block(50, 51, FRAME(bytes(51)), FRAME(bytes(51)), FRAME(bytes(51))),
        block(50, 2, FRAME(b"\x30\x30"), FRAME(bytes(2)), FRAME(bytes(2))),
        block(50, 2, FRAME(b"\x01"), FRAME(bytes(2)), FRAME(bytes(2))),
        block(50, 2**32 - 1, FRAME(bytes(50))),
        block(50, 2**32 - 1, *[FRAME(bytes(50))] * 255),
        block(50, 2**32 - 1, FRAME(bytes(50)), b"no frame"),
        block(50, 2**32 - 1, FRAME(bytes(50)), b""),
        struct.pack("<I", 2**32 - 1) + bytes(100),
        struct.pack("<I", 3) + bytes(3),
        b"\1\0",
        b"",
    ],
)
def test_blocks_that_are_no_blocks(tmp_path, data):
    """Counts, lengths and frames that fit neither each other nor the tensor are damage, found before memory is asked for."""
    path = tmp_path / "ulps"
    path.write_bytes(data)
    tracemalloc.start()
    with closing(Reader()) as reader, pytest.raises(MalformedError, match=r"damaged|too early"):
        Unpacker(StoredTensor("ulps/x", "U8", (len(data),), path, 0), reader, torch.int16).next(50)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 1])
def test_blocks_that_are(tmp_path, dtype, share):
    """Whatever is packed is unpacked, of any size, also the largest and the least of a dtype."""
    torch.manual_seed(int(share * 100))
    values = torch.randint(-300, 300, (5003,)).to(dtype) * (torch.rand(5003) < share)
    if share:
        values[[0, 5002]] = torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max], dtype=dtype)
    parts = values[:1000], values[1000:1001], values[1001:]
    path = tmp_path / "ulps"
    path.write_bytes(b"".join(map(pack, parts)))
    with closing(Reader()) as reader:
        unpacker = Unpacker(StoredTensor("ulps/x", "U8", (path.stat().st_size,), path, 0), reader, dtype)
        found = [unpacker.next(count) for count in (700, 1, 4302)]
    assert torch.equal(torch.cat(found), values)


NORM, ULPS = (f"{kind}/model.layers.0.mlp.up_proj.weight" for kind in ("norm/0", "ulps"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (NORM, torch.ones(95)),
        (NORM, torch.ones(96).double()),
        (NORM, torch.ones(96, 1)),
        (NORM, torch.ones(96, dtype=torch.uint8)),
        (ULPS, torch.ones(4, 2, dtype=torch.uint8)),
        (ULPS, torch.ones(8)),
        ("index/lm_head.weight", torch.tensor([1, 2, 3])),
        ("index/lm_head.weight", torch.tensor([1, 72])),
        ("index/lm_head.weight", torch.tensor([1, -1])),
        ("index/lm_head.weight", torch.tensor([1, 2]).int()),
        ("rows/lm_head.weight", torch.ones(2, 41).bfloat16()),
    ],
)
def test_tensors_that_no_merge_has_left(tmp_path, base, name, value):
    """Parts of a record of another dtype or shape, or that speak of rows that are not there, are refused by name."""
    head = base.tensors["lm_head.weight"].clone()
    head[[3, 70]] += 1
    extra = {"base_model.model.lm_head.weight": head}
    adapter = make_adapter(tmp_path / "saving", base, dora=True, extra=extra, modules_to_save=["lm_head"])
    dora_convert.merge(base.path, adapter, tmp_path / "merged", undo="exact")
    tensors = load_file(tmp_path / "merged" / UNDO)
    assert name in tensors
    save_file(tensors | {name: value}, tmp_path / "merged" / UNDO)
    with pytest.raises(MalformedError, match=name):
        dora_convert.unmerge(tmp_path / "merged", adapter, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "line",
    [
        {"made": "x"},
        {"copied": ["model.safetensors", 0]},
        {"copied": [["x"], 0, 1]},
        {"made": "x", "result": {"base_hash": None, "written_hash": "", "proof": None, "parts": [["x", "F32", [2], [[0, 4]]]], "verdict": None}},
        {"made": "x", "result": {"base_hash": None, "written_hash": "", "proof": None, "parts": [["x", "U8", [9**9], [[0, 9**9]]]], "verdict": None}},
        {"made": "x", "result": {"base_hash": None, "written_hash": "", "proof": None, "parts": [], "verdict": {"wrong": "1"}}},
    ],
)  # fmt: skip
def test_journals_of_nobody(tmp_path, base, adapter, line):
    """A journal whose lines no run has written is refused; what lies in OUT.partial stays."""
    with stopped():
        dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1)
    with (tmp_path / "out.partial/dora_convert/journal.jsonl").open("a") as journal:
        journal.write(json.dumps(line) + "\n")
    with pytest.raises(DoraConvertError, match="journal"):
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out").exists()


def test_hashes_that_are_gone(tmp_path, merged, adapter, base):
    """A receipt without proofs proves nothing: the base comes back, and the report does not call it exact."""
    receipt = json.loads((merged / RECEIPT).read_text())
    for noted in receipt["tensors"].values():
        noted.pop("base_sha256")
        noted.pop("base")
    edit_json(merged / RECEIPT, tensors=receipt["tensors"])
    report = dora_convert.unmerge(merged, adapter, tmp_path / "again")
    assert report.exact["bit_exact"] == 0


@pytest.mark.parametrize(
    ("value", "form", "wrong"),
    [
        ([1, True], list[Count], r"\[1\]: expected `int`"),
        ({"x": -1}, dict[str, Count], "expected `int` >= 0"),
        ({"x": 2**60}, dict[str, Count], "expected `int` <="),
        ([1], tuple[int, str], "length 2"),
        (float("nan"), Real, "expected `float`"),
        (10**400, Real, "out of range"),
        (True, Real, "expected `float`"),
        (3, Real, None),
        ("F32", Dtype, None),
        ("F32\n", Dtype, "regex"),
        ("F", Dtype, "regex"),
        ([1], dict, "expected `object`"),
    ],
)
def test_values_that_are_not_of_a_type(value, form, wrong):
    """JSON values are taken for nothing but what they are; the message names the field."""
    if wrong is None:
        assert checked(value, form, "x") == value
        return
    with pytest.raises(MalformedError, match=wrong):
        checked(value, form, "x")
