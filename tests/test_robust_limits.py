"""What a few bytes of somebody's file may cost: patterns, headers, pickles and JSON with limits on counts, not on bytes alone."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from .toy import Base, edit_json, make_adapter, make_base, write_json

ROOT = Path(__file__).parents[1]
SECONDS = 60
"""Where today it takes minutes; what is right takes about two."""
MEGABYTES = 700
"""Of memory beyond the imports."""

LIMITED = f"""
import resource, sys, torch
import dora_convert.cli.merge, dora_convert.cli.inspect
from dora_convert import merge, inspect
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + {MEGABYTES << 20},) * 2)
"""


def run(*words, prelude=""):
    """A command in a process of its own, which is stopped after some seconds."""
    code = f"{prelude}\nfrom dora_convert.cli import main\nmain()"
    known = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            check=False, capture_output=True, text=True, timeout=SECONDS, env=known,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.fail(f"it takes more than {SECONDS} s", pytrace=False)


# patterns


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ("alpha_pattern", r"(\w+\.?)+!"),
        ("rank_pattern", r"(?:(?:\w|\.)*)*!"),
        ("alpha_pattern", r"((.{1,9}){1,99}){1,99}!"),
    ],
)
@pytest.mark.parametrize("verb", ["merge", "inspect"])
def test_patterns_that_backtrack_for_ever(tmp_path, base, verb, field, pattern):
    """Matched in linear time, or refused with the pattern's name."""
    adapter = make_adapter(tmp_path / "adapter", base, dora=False, **{field: {pattern: 4}})
    words = ["inspect", adapter] if verb == "inspect" else ["merge", base.path, adapter, tmp_path / "out"]
    done = run(*words)
    if done.returncode:
        assert done.returncode == 2, done.stderr
        assert pattern in done.stderr
        assert field in done.stderr
        assert "this is a bug" not in done.stderr


def test_a_pattern_of_target_modules(tmp_path, base):
    """target_modules may be one pattern, which the adapter's promise is read from."""
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    edit_json(adapter / "adapter_config.json", target_modules=r"(\w+\.?)+!")
    done = run("merge", base.path, adapter, tmp_path / "out")
    assert done.returncode in (0, 2), done.stderr


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_globs_that_backtrack(tmp_path, base, adapter, option):
    """The same of names on the command line."""
    done = run("merge", base.path, adapter, tmp_path / "out", option, "*a*a*a*a*e*e*e*e*e*o*o*o*o*!")
    assert done.returncode in (0, 2), done.stderr


@pytest.mark.parametrize("form", ["{}", r"^{}$", "plain"])
def test_a_key_for_each_module(tmp_path, form):
    """A thousand keys for a thousand modules, as EVA and ranks by energy write them: linear, and each is the right one."""
    torch.manual_seed(5)
    names = [f"layers.{n}.proj" for n in range(1000)]
    (tmp_path / "base").mkdir()
    weights = {f"model.{name}.weight": torch.randn(4, 4) for name in names}
    save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    write_json(tmp_path / "base/config.json", {"architectures": ["X"]})
    keys = [f"model.{name}" if form == "plain" else form.format(name.replace(".", r"\.")) for name in names]
    adapter = make_adapter(
        tmp_path / "adapter", Base(tmp_path / "base", weights), dora=False, targets=("proj",), rank=1
    )
    tensors = {}
    for number, name in enumerate(names):
        rank = 1 + number % 2
        tensors[f"base_model.model.model.{name}.lora_A.weight"] = torch.randn(rank, 4)
        tensors[f"base_model.model.model.{name}.lora_B.weight"] = torch.randn(4, rank)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    ranks = {key: 1 + number % 2 for number, key in enumerate(keys)}
    if form.startswith("^"):  # PEFT puts "(.*\.)?" before a key: such a one matches from the beginning only
        ranks = {rf"^model\.{key[1:]}": rank for key, rank in ranks.items()}
    edit_json(adapter / "adapter_config.json", rank_pattern=ranks, alpha_pattern=ranks)
    done = run("merge", tmp_path / "base", adapter, tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"]["merged"] == 1000


# headers


def header(text: bytes, body: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + body


def empty_tensors(count: int) -> bytes:
    entry = '"{:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    return header(("{" + ",".join(map(entry.format, range(count))) + "}").encode())


def long_metadata(count: int) -> bytes:
    return header(('{"__metadata__":{' + ",".join(f'"{n:x}":""' for n in range(count)) + "}}").encode())


def many_dimensions(count: int) -> bytes:
    ones = "1," * count + "1"
    return header(f'{{"a":{{"dtype":"U8","shape":[{ones}],"data_offsets":[0,1]}}}}'.encode(), b"\0")


HEADERS = {
    "empty tensors": lambda: empty_tensors(1_000_000),
    "metadata": lambda: long_metadata(5_000_000),
    "dimensions": lambda: many_dimensions(20_000_000),
    "entries of entries": lambda: header(b'{"a":{' + b",".join(b'"%x":0' % n for n in range(5_000_000)) + b"}}"),
    "lists": lambda: header(b'{"a":[' + b"[]," * 20_000_000 + b"0]}"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
@pytest.mark.parametrize(("kind", "where"), [*((kind, "base") for kind in HEADERS), ("empty tensors", "adapter")])
def test_headers_of_millions(tmp_path, kind, where):
    """A header within its limit of bytes may not hold more entries than any model has: refused within little memory."""
    base = make_base(tmp_path / "base", shards=1)
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    path = {"base": base.path / "model.safetensors", "adapter": adapter / "adapter_model.safetensors"}[where]
    path.write_bytes(HEADERS[kind]())
    words = ["merge", base.path, adapter, tmp_path / "out"]
    refused(run(*words, prelude=LIMITED), path)


def refused(done, path):
    """An error that names the file, not the machine's memory."""
    assert done.returncode == 2, done.stderr
    assert path.name in done.stderr
    assert "too little memory" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "this is a bug" not in done.stderr
    assert max(map(len, done.stderr.splitlines())) < 1000


# pickles


PICKLES = {
    "lists": b"\x80\x02" + b"]" * 30_000_000 + b".",
    "dicts": b"\x80\x02" + b"}" * 30_000_000 + b".",
    "marks": b"\x80\x02" + b"(" * 30_000_000 + b".",
    "pairs": b"\x80\x02N" + b"\x85" * 30_000_000 + b".",
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
@pytest.mark.parametrize(("kind", "form"), [*((kind, "zip") for kind in PICKLES), ("lists", "legacy")])
def test_pickles_of_millions(tmp_path, base, kind, form):
    """A pickle within its limit of bytes may not make more values than 150,000 tensors need."""
    path = tmp_path / "pytorch_model.bin"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", PICKLES[kind])
    else:
        path.write_bytes(
            b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
            + PICKLES[kind]
        )
    refused(run("inspect", path, prelude=LIMITED), path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_archives_of_millions_of_records(tmp_path):
    """Nor may a zip archive hold more records than storages are needed."""
    path = tmp_path / "pytorch_model.bin"
    record = b"PK\x01\x02" + bytes(24) + (1).to_bytes(2, "little") + bytes(16) + b"a"
    count = 1_000_000
    size = len(record) * count
    # a zip64 end, for so many
    end64 = (
        b"PK\x06\x06"
        + (44).to_bytes(8, "little")
        + bytes(12)
        + count.to_bytes(8, "little") * 2
        + size.to_bytes(8, "little")
        + bytes(8)
    )
    locator = b"PK\x06\x07" + bytes(4) + size.to_bytes(8, "little") + (1).to_bytes(4, "little")
    end = b"PK\x05\x06" + bytes(4) + b"\xff" * 4 + b"\xff" * 8 + bytes(2)
    path.write_bytes(record * count + end64 + locator + end)
    refused(run("inspect", path, prelude=LIMITED), path)


# JSON


def object_of(count: int) -> str:
    return "{" + ",".join(f'"{n:x}":0' for n in range(count)) + "}"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
@pytest.mark.parametrize(
    "name",
    [
        "base/config.json",
        "base/model.safetensors.index.json",
        "adapter/adapter_config.json",
        "out/dora_convert/receipt.json",
    ],
)
def test_json_of_millions(tmp_path, base, adapter, name):
    """A JSON file of 7 million keys is refused by its size or its count, before that takes memory."""
    path = tmp_path / name
    words = ["merge", base.path, adapter, tmp_path / "new"]
    if name.startswith("out"):
        assert run("merge", base.path, adapter, tmp_path / "out").returncode == 0
        words = ["unmerge", tmp_path / "out", adapter, tmp_path / "new"]
    path.write_text(object_of(7_000_000))
    refused(run(*words, prelude=LIMITED), path)
