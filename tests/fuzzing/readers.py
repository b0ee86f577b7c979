"""Who reads which file, how it is broken, and what must be true of what was read."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

import dora_convert
from dora_convert.formats.detect import peft
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.json_files import read_json, weight_map
from dora_convert.storage.reader import Reader
from dora_convert.storage.refs import Source
from dora_convert.storage.safetensors import StoredTensor, read_header
from dora_convert.storage.torch_pickle import read_pickle
from dora_convert.undo.packing import Unpacker

from .changes import Change, change_body, change_bytes, change_header, change_json, change_lines, change_packed
from .seeds import COUNT, INTEGERS

SHARD = "model-00001-of-00002.safetensors"
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
RECEIPT, UNDO = "dora_convert/receipt.json", "dora_convert/undo.safetensors"
JOURNAL, IN_PLACE = "dora_convert/journal.jsonl", ".dora-convert-in-place/journal.jsonl"
BROKEN = {SHARD: change_header, TENSORS: change_header, INDEX: change_json, CONFIG: change_json, SETTINGS: change_json}
"""How files of these names are broken."""

Read = Callable[[Path], object]


class Target(NamedTuple):
    """A file that is broken, how, and who reads it then."""

    name: str
    change: Change
    read: Read


def read_as_both(path: Path) -> None:
    """A safetensors file, by our reader, and by the library what ours has taken."""
    header = read_header(path)
    with safe_open(path, "pt") as file:
        assert sorted(header.tensors) == sorted(file.keys()), "the library finds other tensors"
        for name, tensor in header.tensors.items():
            assert list(tensor.shape) == file.get_slice(name).get_shape(), "the library finds another shape"


def unpickle_as_both(path: Path) -> None:
    """The same for a pickle; torch may refuse what it does not like, but must not find anything else."""
    header = read_pickle(path)
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, ValueError, TypeError, KeyError, AttributeError, EOFError):
        return
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    assert shapes == {name: list(tensor.shape) for name, tensor in header.tensors.items()}, "torch finds others"


def unpack(path: Path) -> None:
    """Packed integers, as they were kept of a tensor."""
    dtype = torch.int32 if path.stem == "wide" else torch.int16
    stored = StoredTensor("ulps/x", "U8", (path.stat().st_size,), path, 0)
    with closing(Reader()) as reader:
        assert len(Unpacker(stored, reader, dtype).next(COUNT)) == COUNT


def dry_run(root: Path) -> None:
    """The whole way to a plan."""
    dora_convert.merge(root / "base", root / "adapter", root / "out", dry_run=True)


def dry_run_alone(root: Path) -> None:
    """The same where the adapter says which base it is for."""
    dora_convert.merge(None, root / "adapter", root / "out", dry_run=True)


def making(verb: str, *inputs: str, **options: Any) -> Read:
    """The whole way to a folder, which loaders read; without one, nothing is left, but for what can be continued."""

    def make(root: Path) -> None:
        out = root / "out"
        before = {path.name for path in root.iterdir()} - {"out.partial"}
        try:
            getattr(dora_convert, verb)(*(root / name for name in inputs), out, **options)
            assert {path.name for path in root.iterdir()} == before | {"out"}, "something is left behind"
            for path in out.rglob("*.safetensors"):
                read_as_both(path)
            for path in out.glob("*config.json"):
                json.loads(path.read_bytes())
        except dora_convert.VerificationError as error:
            if verb != "unmerge":
                raise AssertionError("the self-check finds our own result wrong") from error
            raise
        finally:
            new = {path.name for path in root.iterdir()} - before
            for name in new:
                shutil.rmtree(root / name)
        assert new <= {"out", "out.partial"}, "something is outside"

    return make


def continuing(verb: str, *inputs: str, **options: Any) -> Read:
    """The same from where another run was stopped."""
    make = making(verb, *inputs, **options)

    def go_on(root: Path) -> None:
        shutil.copytree(root / f"stopped/{verb}.partial", root / "stopped/out.partial")
        make(root / "stopped")

    return go_on


def in_place(state: str) -> Read:
    """A merge in place from where another was stopped; what lies beside the folder stays as it is."""

    def go_on(root: Path) -> None:
        place = root / "place"
        before = _contents(place)
        shutil.copytree(place / state, place / "model")
        try:
            dora_convert.merge(place / "model", place / "adapter", in_place=True)
        finally:
            shutil.rmtree(place / "model")
            assert _contents(place) == before, "something outside was changed"

    return go_on


def _contents(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in root.rglob("*")}


def _broken(folder: str, names: tuple[str, ...], read: Read) -> list[Target]:
    """One target for each of some files of a folder."""
    return [Target(f"{folder}/{name}", BROKEN[name], read) for name in names]


merge = making("merge", "base", "adapter")
unmerge = making("unmerge", "way/merged", "way/adapter")
TARGETS = [
    Target(f"base/{SHARD}", change_header, lambda root: read_as_both(root / "base" / SHARD)),
    Target(f"base/{INDEX}", change_json, lambda root: weight_map(root / "base" / INDEX)),
    Target(f"base/{INDEX}", change_json, lambda root: open_checkpoint(Source(root / "base", "base"))),
    Target(f"base/{CONFIG}", change_json, lambda root: read_json(root / "base" / CONFIG)),
    Target(f"adapter/{SETTINGS}", change_json, lambda root: peft.read(Source(root / "adapter", "adapter"))),
    Target(f"adapter/{TENSORS}", change_header, lambda root: peft.read(Source(root / "adapter", "adapter"))),
    Target("new.bin", change_bytes, lambda root: unpickle_as_both(root / "new.bin")),
    Target("old.bin", change_bytes, lambda root: unpickle_as_both(root / "old.bin")),
    *_broken("base", (SHARD, INDEX, CONFIG), dry_run),
    *_broken("adapter", (SETTINGS, TENSORS), dry_run),
    Target(f"adapter/{SETTINGS}", change_json, dry_run_alone),
    *_broken("base", (SHARD, CONFIG), merge),
    *_broken("adapter", (SETTINGS, TENSORS), merge),
    *(
        Target(f"{name}.packed", change_packed, lambda root, name=name: unpack(root / f"{name}.packed"))
        for name in INTEGERS
    ),
    Target(f"way/merged/{RECEIPT}", change_json, unmerge),
    Target(f"way/merged/{UNDO}", change_header, unmerge),
    Target(f"way/merged/{UNDO}", change_body, unmerge),
    Target(f"way/norms/{RECEIPT}", change_json, making("unmerge", "way/norms", "way/adapter")),
    Target(f"way/norms/{UNDO}", change_header, making("unmerge", "way/norms", "way/adapter")),
    *_broken("way/merged", (SHARD, INDEX, CONFIG), unmerge),
    Target(f"stopped/merge.partial/{JOURNAL}", change_lines, continuing("merge", "base", "adapter", undo="exact")),
    Target(f"stopped/unmerge.partial/{JOURNAL}", change_lines, continuing("unmerge", "merged", "adapter")),
    Target(f"place/changing/{IN_PLACE}", change_lines, in_place("changing")),
    Target(f"place/staged/{IN_PLACE}", change_lines, in_place("staged")),
    *_broken("way/tuned", (SHARD, INDEX, CONFIG), making("extract", "way/base", "way/tuned", kind="lora", rank=3)),
    *_broken("way/tuned", (SHARD, CONFIG), making("extract", "way/base", "way/tuned", kind="dora", rank=3)),
    *_broken("adapter", (SETTINGS, TENSORS), making("to_lora", "base", "adapter", rank=9)),
    *_broken("lora", (SETTINGS, TENSORS), making("from_lora", "base", "lora")),
]
