"""The record by which a merge can be audited and undone: receipt and undo record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.storage.json_files import indented
from dora_convert.storage.safetensors import StoredTensor, encode_header

from .toy import contents, exact, load, make_adapter  # fmt: skip


def test_receipt(tmp_path, base, adapter):
    """The receipt lists changed tensors with hashes of their old and new bytes, and names no path, date or OUT."""
    import xxhash

    dora_convert.merge(base.path, adapter, tmp_path / "some-output")
    text = (tmp_path / "some-output/dora_convert/receipt.json").read_text()
    receipt = json.loads(text)
    merged = load(tmp_path / "some-output")
    assert len(receipt["tensors"]) == 6
    for name, entry in receipt["tensors"].items():
        for key, tensor in (("base", base.tensors[name]), ("written", merged[name])):
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert entry[key] == xxhash.xxh3_128_hexdigest(data)
    assert str(tmp_path) not in text
    assert "some-output" not in text
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    assert receipt["adapters"][0]["files"]["adapter_model.safetensors"] == xxhash.xxh3_128_hexdigest(weights)


def test_undo_norms(tmp_path, base, adapter):
    """The undo record holds ‖W + sBA‖ of every row in float32, and the README that ours replaces."""
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    record = load_file(tmp_path / "out/dora_convert/undo.safetensors")
    lora = tmp_path / "lora"
    shutil.copytree(adapter, lora)
    save_file(
        {k: v for k, v in load_file(adapter / "adapter_model.safetensors").items() if "magnitude" not in k},
        lora / "adapter_model.safetensors",
    )
    for name, V in exact(base, lora).items():
        if f"norm/0/{name}" in record:
            assert torch.equal(record.pop(f"norm/0/{name}"), V.norm(dim=1).float())
    assert bytes(record.pop("file/README.md").numpy()) == b"# the base\n"
    assert set(record) == {"file/model.safetensors.index.json"}


def test_undo_none_leaves_no_record(tmp_path, base, adapter):
    """--undo none writes the receipt and nothing to undo with."""
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", undo="none")
    assert [path.name for path in (tmp_path / "out/dora_convert").iterdir()] == ["receipt.json"]
    assert report.undo == "none"


def test_merging_a_merged_base_stacks_the_record(tmp_path, base, adapter):
    """The first merge's record is kept under the second's."""
    second = make_adapter(tmp_path / "second", base, dora=False, seed=9)
    dora_convert.merge(base.path, adapter, tmp_path / "one")
    dora_convert.merge(tmp_path / "one", second, tmp_path / "two")
    assert contents(tmp_path / "two/dora_convert/previous") == contents(tmp_path / "one/dora_convert")


class Plain(msgspec.Struct):
    """Texts and other values."""

    texts: dict[str, str]
    others: dict[str, list[float | int | bool | None]]


def test_texts_and_numbers_are_written_as_python_writes_them():
    """The large fields of a receipt, which msgspec writes, have the bytes that Python's own code gives them."""
    texts = {chr(code): "".join(map(chr, range(code, code + 16))) for code in range(0, 0xD7F0, 16)}
    plain = Plain(texts, {"": [1e-05, 1e16, 0.1, 3, None, True]})
    values = {"texts": plain.texts, "others": plain.others}
    assert indented(plain, ("texts",)) == (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode()


class Sparse(msgspec.Struct, omit_defaults=True):
    """Texts with a default, and without."""

    kept: dict[str, str]
    copied: dict[str, str] = {}
    number: int = 0


def test_empty_texts_are_written_unless_they_are_the_default():
    """A field without a default is there, even if it is empty."""
    assert indented(Sparse({}), ("kept", "copied")) == b'{\n "kept": {}\n}\n'
    assert json.loads(indented(Sparse({}, {"a": "b"}), ("kept", "copied"))) == {"kept": {}, "copied": {"a": "b"}}


def test_headers_are_written_as_python_writes_them():
    """msgspec gives names and metadata the bytes that Python's own code gives them."""
    texts = ["".join(map(chr, range(code, code + 16))) for code in range(0, 0xD7F0, 16)]
    tensors = [StoredTensor(text, "BF16", (2, k), Path(), 0) for k, text in enumerate(texts)]
    entries, position = {"__metadata__": {text: text for text in texts}}, 0
    for tensor in tensors:
        offsets = [position, position := position + tensor.nbytes]
        entries[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    assert encode_header(tensors, entries["__metadata__"])[8:].rstrip(b" ") == text
