"""Throw broken files at everything that reads headers and configs: python tests/fuzz.py --seconds 60 [--seed N] [--start I]

Each iteration takes good files, changes one of them a little, and reads them. Nothing but DoraConvertError may escape,
nothing may take long, and what we take for a safetensors file or a pickle of tensors, their own libraries do, too. A
failure prints the seed and the iteration that make it again, and the exit code is 1.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it

import torch
from safetensors import safe_open
from toy import make_adapter, make_base

import dora_convert
from dora_convert.checkpoint import open_checkpoint, weight_map
from dora_convert.formats import peft
from dora_convert.json_files import read_json
from dora_convert.pickled import read_pickle
from dora_convert.refs import Source
from dora_convert.stored import read_header

SECONDS = 2
"""More than any file here takes."""

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 3, 1.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**30, 10**400,
    "", "x", "a\0b", "\n", "\ud800", "../x", "9" * 5000, "x" * 5000, "(", "lm_head", "none", "F32", "LORA", "pissa",
    [], [[]], [0], [-1], [0, 10**12], [[0, 2]], [[0, 10**12]], [[1, 0]], ["x"], [None], [{}], [10**18] * 50, ["0", "1"],
    {}, {"": 1}, {"x": None}, {"x": "y"}, {"up_proj": 3}, {"quant_method": 5}, {"x": {"y": []}}, {"nblocks": 2},
]  # fmt: skip
"""Values that a field may have instead of its own."""

KEYS = (
    "", "x", "bias", "lora_bias", "use_dora", "rank_pattern", "alpha_pattern", "layer_replication", "target_parameters",
    "trainable_token_indices", "modules_to_save", "init_lora_weights", "use_bdlora", "kasa_config", "peft_version",
    "ensure_weight_tying", "auto_mapping", "task_type", "revision", "text_config", "num_hidden_layers", "vocab_size",
    "quantization_config", "tie_word_embeddings", "architectures", "layer_types", "__metadata__", "weight_map", "init_r",
)  # fmt: skip
"""Fields that may come to be there."""


def change_bytes(chance: random.Random, data: bytes) -> bytes:
    """A few bytes changed, inserted, left out or said twice; more often near the start, where headers are."""
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        reach = len(raw) if chance.random() < 0.5 else min(len(raw), 300)
        at = chance.randrange(reach + 1)
        piece = raw[at : at + chance.choice((1, 2, 8, 64))]
        match chance.randrange(6):
            case 0 | 1 if at < len(raw):
                raw[at] = chance.choice((0, 0xFF, raw[at] ^ 1 << chance.randrange(8), chance.randrange(256)))
            case 2:
                raw[at:at] = chance.randbytes(chance.choice((1, 8)))
            case 3:
                del raw[at : at + len(piece)]
            case 4:
                raw[at:at] = piece
            case 5:
                del raw[at if chance.random() < 0.2 else len(raw) :]
    return bytes(raw)


def change_value(chance: random.Random, value: Any) -> Any:
    """A JSON value where something deep inside is another."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        return _change_entry(chance, value)
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        new = chance.choice(([], [value[at]] * 2, [change_value(chance, value[at])]))
        return [*value[:at], *new, *value[at + 1 :]]
    if type(value) is int and chance.random() < 0.5:
        return value + chance.choice((-1, 1, 4, -4, 2**32))
    return chance.choice(NASTY)


def _change_entry(chance: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    key = chance.choice(list(value))
    kept = {name: item for name, item in value.items() if name != key}
    match chance.randrange(8):
        case 0:
            return kept
        case 1:
            return {**kept, chance.choice([*KEYS, key + "x", key.replace("0", "1")]): value[key]}
        case 2:
            return {**value, chance.choice(KEYS): chance.choice(NASTY)}
    return {**value, key: change_value(chance, value[key])}


def change_json(chance: random.Random, data: bytes) -> bytes:
    """A JSON file with another value, or other bytes."""
    if chance.random() < 0.3:
        return change_bytes(chance, data)
    value = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        value = change_value(chance, value)
    return json.dumps(value).encode(errors="surrogatepass")


def change_header(chance: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, with or without its length put right."""
    if chance.random() < 0.4:
        return change_bytes(chance, data)
    end = 8 + int.from_bytes(data[:8], "little")
    text = change_json(chance, data[8:end])
    length = len(text) if chance.random() < 0.9 else end - 8
    return length.to_bytes(8, "little") + text + data[end:]


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
    assert shapes == {name: list(tensor.shape) for name, tensor in header.tensors.items()}, (
        "torch finds others"
    )


def dry_run(root: Path) -> None:
    """The whole way to a plan."""
    dora_convert.merge(root / "base", root / "adapter", root / "out", dry_run=True)


def dry_run_alone(root: Path) -> None:
    """The same where the adapter says which base it is for."""
    dora_convert.merge(None, root / "adapter", root / "out", dry_run=True)


def merge(root: Path) -> None:
    """The whole way to a merged model, which a loader reads."""
    out = root / "out"
    try:
        dora_convert.merge(root / "base", root / "adapter", out)
        for path in out.glob("*.safetensors"):
            read_as_both(path)
        json.loads((out / "config.json").read_bytes())
    except dora_convert.VerificationError as error:
        raise AssertionError("the self-check finds our own result wrong") from error
    finally:
        left = [path for path in root.glob("out*") if path.name != "out"]
        for path in (out, *left):
            shutil.rmtree(path, ignore_errors=True)
    assert not left, "something is left behind"


def make_seeds(root: Path) -> None:
    """Good files of every kind."""
    base = make_base(root / "base")
    make_adapter(root / "adapter", base, dora=True)
    config = json.loads((root / "adapter/adapter_config.json").read_text())
    config |= {
        "base_model_name_or_path": str(root / "base"),
        "rank_pattern": {"k_proj": 4}, "alpha_pattern": {"up_proj": 3.5}, "modules_to_save": None, "revision": None,
        "layer_replication": None, "init_lora_weights": True, "use_rslora": True, "peft_version": "0.18.1",
        "trainable_token_indices": None, "target_parameters": None, "auto_mapping": None, "layers_pattern": None,
    }  # fmt: skip
    (root / "adapter/adapter_config.json").write_text(json.dumps(config))
    tensors = {"a": torch.ones(3, 5), "b.weight": torch.ones(4).bfloat16(), "c": torch.tensor(2)}
    torch.save(tensors, root / "new.bin")
    torch.save(tensors, root / "old.bin", _use_new_zipfile_serialization=False)


Change = Callable[[random.Random, bytes], bytes]
SHARD = "base/model-00001-of-00002.safetensors"
INDEX, CONFIG = "base/model.safetensors.index.json", "base/config.json"
SETTINGS, TENSORS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
TARGETS: list[tuple[str, Change, Callable[[Path], object]]] = [
    (SHARD, change_header, lambda root: read_as_both(root / SHARD)),
    (INDEX, change_json, lambda root: weight_map(root / INDEX)),
    (INDEX, change_json, lambda root: open_checkpoint(Source(root / "base", "base"))),
    (CONFIG, change_json, lambda root: read_json(root / CONFIG)),
    (SETTINGS, change_json, lambda root: peft.read(Source(root / "adapter", "adapter"))),
    (TENSORS, change_header, lambda root: peft.read(Source(root / "adapter", "adapter"))),
    ("new.bin", change_bytes, lambda root: unpickle_as_both(root / "new.bin")),
    ("old.bin", change_bytes, lambda root: unpickle_as_both(root / "old.bin")),
    *((name, change, dry_run) for name, change in (
        (SHARD, change_header), (INDEX, change_json), (CONFIG, change_json), (SETTINGS, change_json), (TENSORS, change_header),
    )),
    (SETTINGS, change_json, dry_run_alone),
    *((name, change, merge) for name, change in (
        (SHARD, change_header), (CONFIG, change_json), (SETTINGS, change_json), (TENSORS, change_header),
    )),
]  # fmt: skip
"""The file that is changed, how, and who reads it."""


def check_message(error: dora_convert.DoraConvertError) -> None:
    """Few lines, in any encoding."""
    lines = error.text().splitlines()
    assert len(lines) <= 12, "a message of many lines"
    assert max(map(len, lines)) < 700, "a message of a long line"
    json.dumps(error.to_dict(), ensure_ascii=False).encode()


def attempt(root: Path, seed: int, iteration: int) -> str:
    """One iteration: "taken" or "refused"; whatever else escapes is a failure."""
    chance = random.Random(f"{seed}:{iteration}")
    name, change, read = chance.choice(TARGETS)
    good = (root / name).read_bytes()
    (root / name).write_bytes(change(chance, good))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read(root)
    except dora_convert.DoraConvertError as error:
        check_message(error)
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.copyfile(root / name, root / "last")
        (root / name).write_bytes(good)
    return "taken"


def too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def main() -> int:
    """Run for a while; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--start", type=int, default=0)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_long)
    counts: collections.Counter[str] = collections.Counter()
    failures: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        make_seeds(root := Path(folder))
        end, iteration = time.monotonic() + chosen.seconds, chosen.start
        while time.monotonic() < end:
            try:
                counts[attempt(root, chosen.seed, iteration)] += 1
            except Exception as error:  # noqa: BLE001 - which is what is looked for
                counts["failed"] += 1
                if (place := where(error)) not in failures:
                    failures.add(place)
                    traceback.print_exc(limit=-3)
                    print(f"the file begins with {(root / 'last').read_bytes()[:1000]!r}")
                    print(
                        f"again: python tests/fuzz.py --seed {chosen.seed} --start {iteration} --seconds 1\n"
                    )
            iteration += 1
    print(
        f"fuzz: {iteration - chosen.start} files, {dict(counts)}, seed {chosen.seed}, {len(failures)} failures"
    )
    return 1 if failures else 0


def where(error: Exception) -> str:
    """What a failure is told from others by: its type, and the last line of ours on the way there."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "dora_convert" in frame.filename
    ]
    return f"{type(error).__name__} {frames[-1].filename}:{frames[-1].lineno}" if frames else repr(error)


if __name__ == "__main__":
    sys.exit(main())
