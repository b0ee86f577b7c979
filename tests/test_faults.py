"""Every way an input can be broken: exit code 2, a few clear lines, nothing under OUT's name, and inputs as they were."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_convert.cli import main

from .toy import edit_json

SHARD, OTHER = "base/model-00001-of-00002.safetensors", "base/model-00002-of-00002.safetensors"
INDEX, CONFIG = "base/model.safetensors.index.json", "base/config.json"
TENSORS, SETTINGS = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"
UP = "base_model.model.model.layers.0.mlp.up_proj"
SECONDS = 20
"""More than any of this takes: a command that waits for a pipe is stopped then."""


def put(name, data):
    """A file of other bytes."""
    return lambda root: (root / name).write_bytes(data)


def value(name, value):
    """A file of another JSON value."""
    return put(name, json.dumps(value).encode())


def fields(name, **changed):
    """A JSON file with some fields changed."""
    return lambda root: edit_json(root / name, **changed)


def cut(name, length):
    """A file's first bytes, or all but some of its last."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:length])


def add(name, data):
    """A file with bytes behind it."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes() + data)


def header(name, change):
    """A safetensors file with another header: `change` gets its entries, and returns them or the raw JSON."""

    def act(root):
        raw = (root / name).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        changed = change(json.loads(raw[8:end]))
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        (root / name).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    return act


def entry(name, **changed):
    """A safetensors file where the first tensor is declared otherwise."""

    def change(entries):
        first = next(key for key in entries if key != "__metadata__")
        return entries | {first: entries[first] | changed}

    return header(name, change)


def shift(name, by):
    """A safetensors file where the last tensor is said to lie elsewhere."""

    def change(entries):
        last = max((key for key in entries if key != "__metadata__"), key=lambda key: entries[key]["data_offsets"])
        offsets = [each + by for each in entries[last]["data_offsets"]]
        return entries | {last: entries[last] | {"data_offsets": offsets}}

    return header(name, change)


def tensors(name, change):
    """A safetensors file with other tensors: `change` gets all of them and may return others."""

    def act(root):
        found = load_file(root / name)
        made = change(found)
        save_file(found if made is None else made, root / name, {"format": "pt"})

    return act


def index(change):
    """Another weight_map: `change` gets it."""

    def act(root):
        table = json.loads((root / INDEX).read_text())["weight_map"]
        change(table)
        edit_json(root / INDEX, weight_map=table)

    return act


def names(filename):
    """An index whose first tensor lies in a file of that name."""
    return index(lambda table: table.update({min(table): filename}))


def instead(name, make):
    """Something else in the place of a file: `make` gets its path."""

    def act(root):
        (root / name).rename(root / "moved")
        make(root / name)

    return act


def words(*chosen):
    """Another command line; `act` may prepare something."""
    return lambda root: [word.format(root=root) for word in chosen]


def after(make, *chosen):
    """Prepare something, then another command line."""

    def act(root):
        make(root)
        return words(*chosen)(root)

    return act


def escaping(root):
    """A real file outside the base's folder, of the right contents."""
    shutil.move(root / SHARD, root / "x.safetensors")
    index(lambda table: table.update({key: f"../x.safetensors" for key, file in table.items() if file in SHARD}))(root)


def loop(path):
    path.symlink_to(path.name)


def dangling(path):
    path.symlink_to("nowhere")


SAME = "{root}/base", "{root}/adapter"

ROWS = {
    # a base's weight files
    "empty shard": (put(SHARD, b""), "x"),
    "seven bytes": (put(SHARD, b"1234567"), "x"),
    "only a length": (put(SHARD, bytes(8)), "x"),
    "truncated header": (cut(SHARD, 100), "x"),
    "truncated body": (cut(SHARD, -10), "x"),
    "truncated other shard": (cut(OTHER, -1), "x"),
    "trailing bytes": (add(SHARD, b"\0" * 8), "x"),
    "huge length": (put(SHARD, b"\xff" * 8 + b"{}"), "x"),
    "length of 100 MB": (put(SHARD, (10**8).to_bytes(8, "little") + b"{}"), "x"),
    "overlap": (shift(SHARD, -4), "x"),
    "gap": (shift(SHARD, 4), "x"),
    "wrong dtype": (entry(SHARD, dtype="F64"), "x"),
    "unknown dtype": (entry(SHARD, dtype="F31"), "x"),
    "dtype no string": (entry(SHARD, dtype=["F32"]), "x"),
    "wrong shape": (entry(SHARD, shape=[3, 5]), "x"),
    "negative shape": (entry(SHARD, shape=[-72, -40]), "x"),
    "float shape": (entry(SHARD, shape=[72.0, 40]), "x"),
    "bool shape": (entry(SHARD, shape=[True, 2880]), "x"),
    "string shape": (entry(SHARD, shape="72x40"), "x"),
    "huge shape": (entry(SHARD, shape=[2**63, 2**63]), "x"),
    "shape of many dimensions": (entry(SHARD, shape=[10**18] * 20000), "x"),
    "shape of ten thousand digits": (header(SHARD, lambda _: b'{"a": {"dtype": "F32", "shape": [1' + b"0" * 10000 + b'], "data_offsets": [0, 4]}}'), "x"),
    "shape of four thousand digits": (header(SHARD, lambda _: b'{"a": {"dtype": "F32", "shape": [1' + b"0" * 4000 + b'], "data_offsets": [0, 4]}}'), "x"),
    "offsets reversed": (entry(SHARD, data_offsets=[5760, 0]), "x"),
    "one offset": (entry(SHARD, data_offsets=[0]), "x"),
    "offsets null": (entry(SHARD, data_offsets=None), "x"),
    "offsets beyond the file": (entry(SHARD, data_offsets=[10**15, 10**15 + 5760]), "x"),
    "NaN in the header": (header(SHARD, lambda _: b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}'), "x"),
    "deep nesting": (header(SHARD, lambda _: b"[" * 100_000), "x"),
    "deep nesting of objects": (header(SHARD, lambda _: b'{"a":' * 100_000), "x"),
    "duplicate keys": (header(SHARD, lambda _: b'{"a": 1, "a": 2}'), "x"),
    "not UTF-8": (header(SHARD, lambda _: b'{"\xff\xfe": 1}'), "x"),
    "surrogate": (header(SHARD, lambda _: b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'), "x"),
    "UTF-16": (header(SHARD, lambda e: json.dumps(e).encode("utf-16")), "x"),
    "BOM": (header(SHARD, lambda e: json.dumps(e).encode("utf-8-sig")), "x"),
    "leading space": (header(SHARD, lambda e: b"  " + json.dumps(e).encode()), "x"),
    "metadata of numbers": (header(SHARD, lambda e: e | {"__metadata__": {"format": 1}}), "x"),
    "header a list": (header(SHARD, lambda e: [e]), "x"),
    "header null": (header(SHARD, lambda _: b"null"), "x"),
    "header a number": (header(SHARD, lambda _: b"1e999"), "x"),
    "weights a Git LFS pointer": (put(SHARD, POINTER), "x"),
    "weights a web page": (put(SHARD, b"<!DOCTYPE html><html><body>404</body></html>"), "x"),
    "weights a zip": (put(SHARD, b"PK\3\4" + bytes(100)), "x"),
    "shard a folder": (instead(SHARD, lambda p: p.mkdir()), "x"),
    "shard a pipe": (instead(SHARD, os.mkfifo), "x"),
    "shard a loop": (instead(SHARD, loop), "x"),
    "shard a dangling link": (instead(SHARD, dangling), "x"),
    "shard missing": (lambda root: (root / SHARD).unlink(), "x"),
    "same tensor twice": (lambda root: shutil.copy(root / SHARD, root / OTHER), "x"),
    # its index
    "index escapes": (escaping, "x"),
    "index absolute": (lambda root: names(str(root / SHARD))(root), "x"),
    "index with a backslash": (names("..\\model.safetensors"), "x"),
    "index with NUL": (names("a\0b.safetensors"), "x"),
    "index empty name": (names(""), "x"),
    "index dot": (names("."), "x"),
    "index a folder": (lambda root: ((root / "base/sub").mkdir(), names("sub")(root))[1], "x"),
    "index sub/name": (names("sub/x.safetensors"), "x"),
    "index missing": (names("gone.safetensors"), "x"),
    "index very long": (names("x" * 5000), "x"),
    "index newline": (names("a\nb.safetensors"), "x"),
    "index surrogate": (put(INDEX, b'{"weight_map": {"a": "\\ud800.safetensors"}}'), "x"),
    "index number": (names(5), "x"),
    "index list": (fields(INDEX, weight_map=["a"]), "x"),
    "index no map": (value(INDEX, {"metadata": {}}), "x"),
    "index empty map": (value(INDEX, {"weight_map": {}}), "x"),
    "index a config": (names("config.json"), "x"),
    "index a list": (value(INDEX, []), "x"),
    "index truncated": (cut(INDEX, 100), "x"),
    "index pointer": (put(INDEX, POINTER), "x"),
    "index empty": (put(INDEX, b""), "x"),
    "index pipe": (instead(INDEX, os.mkfifo), "x"),
    "index a folder itself": (instead(INDEX, lambda p: p.mkdir()), "x"),
    "index names tensors that are not there": (index(lambda t: t.update({"model.ghost.weight": SHARD[5:]})), "x"),
    "index mixes up files": (index(lambda t: t.update({min(t): "model-00002-of-00002.safetensors" if t[min(t)].startswith("model-00001") else "model-00001-of-00002.safetensors"})), "x"),
    # config.json
    **{f"config {text[:20]!r}": (put(CONFIG, text), "x") for text in (
        b"", b"[]", b'"llama"', b"5", b"null", b"{", b"\xff\xfe\x00", b"\x80\x04\x95", b"{}x", b"[" * 100_000, b'{"a":' * 100_000, b"NaN", POINTER, b"1" * 10_000, b'{"hidden_size": 1' + b"0" * 10_000 + b"}",
    )},
    **{f"config {key}={val!r}": (fields(CONFIG, **{key: val}), "x") for key, val in (
        ("architectures", 5), ("architectures", "LlamaForCausalLM"), ("architectures", [5]), ("model_type", []), ("model_type", 5), ("tie_word_embeddings", "yes"), ("text_config", []), ("text_config", "x"),
        ("vocab_size", "many"), ("torch_dtype", 5), ("dtype", []), ("quantization_config", 5), ("quantization_config", []), ("quantization_config", {}), ("quantization_config", {"quant_method": "fp8"}),
        ("hidden_size", -1), ("num_hidden_layers", "two"), ("layer_types", 5), ("_name_or_path", 5), ("transformers_version", []),
    )},
    "config a folder": (instead(CONFIG, lambda p: p.mkdir()), "x"),
    "config a pipe": (instead(CONFIG, os.mkfifo), "x"),
    "config a loop": (instead(CONFIG, loop), "x"),
    "config dangling": (instead(CONFIG, dangling), "x"),
    "side file a pipe": (lambda root: os.mkfifo(root / "base/vocab.json"), "x"),
    "side folder a loop": (lambda root: loop(root / "base/loop"), "x"),
    "side folder .. loop": (lambda root: (root / "base/loop").symlink_to("."), "x"),
    "adapter tokenizer pipe": (lambda root: os.mkfifo(root / "adapter/tokenizer.json"), "x"),
    # adapter_config.json
    **{f"adapter config {text[:20]!r}": (put(SETTINGS, text), "x") for text in (
        b"", b"[]", b'"lora"', b"5", b"null", b"{}", b"{", b"\xff\xfe\x00", b"[" * 100_000, POINTER,
    )},
    **{f"adapter {key}={val!r}": (fields(SETTINGS, **{key: val}), "x") for key, val in (
        ("r", 0), ("r", -1), ("r", 1.5), ("r", True), ("r", "8"), ("r", []), ("r", 10**30), ("r", 5), ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("lora_alpha", 0), ("lora_alpha", -4), ("lora_alpha", "16"),
        ("lora_alpha", True), ("lora_alpha", 10**400), ("lora_alpha", 1e308), ("lora_alpha", 1e-320), ("rank_pattern", []), ("rank_pattern", "up_proj"), ("rank_pattern", {"up_proj": "4"}), ("rank_pattern", {"up_proj": 0}), ("rank_pattern", {"(": 4}),
        ("rank_pattern", {"(a+)+$": 4}), ("rank_pattern", {"((m|o|d|e|l|.)*)*x": 4}), ("rank_pattern", {"up_proj": 10**30}), ("alpha_pattern", {"up_proj": None}), ("alpha_pattern", {"up_proj": float("nan")}), ("alpha_pattern", 5), ("modules_to_save", "lm_head"), ("modules_to_save", [5]), ("modules_to_save", {"a": 1}),
        ("peft_type", None), ("peft_type", "lora"), ("peft_type", ["LORA"]), ("peft_type", 5), ("peft_type", "PREFIX_TUNING"), ("base_model_name_or_path", 5), ("base_model_name_or_path", ["a"]), ("use_dora", "yes"), ("use_dora", 1), ("use_rslora", "no"),
        ("use_dora", False), ("target_modules", 5), ("bias", 5), ("bias", "some"), ("init_lora_weights", 5), ("init_lora_weights", {}), ("init_lora_weights", "magic"), ("layer_replication", 5), ("layer_replication", [[0, 99]]), ("fan_in_fan_out", "x"), ("megatron_config", 5),
        ("trainable_token_indices", "x"), ("trainable_token_indices", {"a": "b"}), ("target_parameters", 5), ("target_parameters", [5]), ("lora_bias", "x"), ("a_new_field", 1), ("revision", 5), ("revision", []), ("peft_version", 5), ("task_type", 5), ("auto_mapping", 5), ("auto_mapping", {"base_model_class": 5}),
        ("x\ny", "z"), ("exclude_modules", 5), ("layers_to_transform", "x"), ("loftq_config", 5),
    )},
    "adapter config a pipe": (instead(SETTINGS, os.mkfifo), "x"),
    "adapter config a folder": (instead(SETTINGS, lambda p: p.mkdir()), "x"),
    "adapter config dangling": (instead(SETTINGS, dangling), "x"),
    "adapter config a loop": (instead(SETTINGS, loop), "x"),
    # its tensors
    "adapter pointer": (put(TENSORS, POINTER), "x"),
    "adapter empty": (put(TENSORS, b""), "x"),
    "adapter truncated": (cut(TENSORS, -3), "x"),
    "adapter no tensors": (tensors(TENSORS, lambda t: {}), "x"),
    "adapter a folder": (instead(TENSORS, lambda p: p.mkdir()), "x"),
    "adapter a pipe": (instead(TENSORS, os.mkfifo), "x"),
    "adapter dangling": (instead(TENSORS, dangling), "x"),
    "adapter loop": (instead(TENSORS, loop), "x"),
    "adapter missing": (lambda root: (root / TENSORS).unlink(), "x"),
    "half A": (tensors(TENSORS, lambda t: t.pop(f"{UP}.lora_B.weight").numel() and None), "x"),
    "half B": (tensors(TENSORS, lambda t: t.pop(f"{UP}.lora_A.weight").numel() and None), "x"),
    "no m": (tensors(TENSORS, lambda t: t.pop(f"{UP}.lora_magnitude_vector").numel() and None), "x"),
    "only m": (tensors(TENSORS, lambda t: {k: v for k, v in t.items() if not k.startswith(UP) or "magn" in k}), "x"),
    "NaN": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_A.weight": torch.full((4, 40), float("nan"))})), "x"),
    "Inf": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_B.weight": t[f"{UP}.lora_B.weight"] / 0}) ), "x"),
    "wrong shape A": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(4, 41)})), "x"),
    "wrong shape B": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_B.weight": torch.ones(95, 4)})), "x"),
    "transposed B": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_B.weight": torch.ones(4, 96)})), "x"),
    "wrong shape m": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_magnitude_vector": torch.ones(40)})), "x"),
    "m a matrix": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_magnitude_vector": torch.ones(96, 2)})), "x"),
    "m a scalar": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_magnitude_vector": torch.tensor(1.0)})), "x"),
    "vector A": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(160)})), "x"),
    "rank 0": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(0, 40), f"{UP}.lora_B.weight": torch.ones(96, 0)})), "x"),
    "another rank": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(5, 40), f"{UP}.lora_B.weight": torch.ones(96, 5)})), "x"),
    "integers": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(4, 40).int()})), "x"),
    "fp8": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(4, 40).to(torch.float8_e4m3fn)})), "x"),
    "zero m": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_magnitude_vector": torch.zeros(96)})), "x"),
    "negative m": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_magnitude_vector": -torch.ones(96)})), "x"),
    "huge overflow": (tensors(TENSORS, lambda t: t.update({f"{UP}.lora_magnitude_vector": torch.full((96,), 3e38), f"{UP}.lora_A.weight": torch.full((4, 40), 1e30), f"{UP}.lora_B.weight": torch.full((96, 4), 1e30)})), "x"),
    "unknown module": (tensors(TENSORS, lambda t: {k.replace("up_proj", "upp_proj"): v for k, v in t.items()}), "x"),
    "stray": (tensors(TENSORS, lambda t: t.update({"stray": torch.ones(3)})), "x"),
    "empty name": (tensors(TENSORS, lambda t: t.update({"": torch.ones(3)})), "x"),
    "newline name": (tensors(TENSORS, lambda t: t.update({"a\nb": torch.ones(3)})), "x"),
    "long name": (tensors(TENSORS, lambda t: t.update({"a" * 50_000: torch.ones(3)})), "x"),
    "many strays": (tensors(TENSORS, lambda t: t.update({f"stray.{n}": torch.ones(3) for n in range(1000)})), "x"),
    "lora twice": (tensors(TENSORS, lambda t: t.update({f"{UP.removeprefix('base_model.model.')}.lora_A.weight": torch.ones(4, 40)})), "x"),
    # places
    "swapped": (words("{root}/adapter", "{root}/base", "{root}/out"), "x"),
    "base twice": (words("{root}/base", "{root}/base", "{root}/out"), "x"),
    "adapter twice": (words("{root}/adapter", "{root}/adapter", "{root}/out"), "x"),
    "out is base": (words(*SAME, "{root}/base"), "x"),
    "out is adapter": (words(*SAME, "{root}/adapter"), "x"),
    "out is base, overwrite": (words(*SAME, "{root}/base", "--overwrite"), "x"),
    "out is adapter, overwrite": (words(*SAME, "{root}/adapter", "--overwrite"), "x"),
    "out is base by ..": (words(*SAME, "{root}/adapter/../base", "--overwrite"), "x"),
    "out in base": (words(*SAME, "{root}/base/out"), "x"),
    "out in adapter": (words(*SAME, "{root}/adapter/out"), "x"),
    "out around base": (words(*SAME, "{root}", "--overwrite"), "x"),
    "out a file": (after(put("f", b"x"), *SAME, "{root}/f"), "x"),
    "out a file, overwrite": (after(put("f", b"x"), *SAME, "{root}/f", "--overwrite"), "x"),
    "out dangling": (after(lambda root: dangling(root / "l"), *SAME, "{root}/l"), "x"),
    "out dangling, overwrite": (after(lambda root: dangling(root / "l"), *SAME, "{root}/l", "--overwrite"), "x"),
    "out a loop": (after(lambda root: loop(root / "l"), *SAME, "{root}/l"), "x"),
    "out a link to base": (after(lambda root: (root / "l").symlink_to("base"), *SAME, "{root}/l", "--overwrite"), "x"),
    "out under a link to base": (after(lambda root: (root / "l").symlink_to("base"), *SAME, "{root}/l/out"), "x"),
    "out exists": (after(lambda root: (root / "o").mkdir(), *SAME, "{root}/o"), "x"),
    "out exists, of the user": (after(lambda root: ((root / "o").mkdir(), put("o/thesis.txt", b"x")(root)), *SAME, "{root}/o", "--overwrite"), "x"),
    "parent a file": (after(put("f", b"x"), *SAME, "{root}/f/out"), "x"),
    "parent a pipe": (after(lambda root: os.mkfifo(root / "f"), *SAME, "{root}/f/out"), "x"),
    "parent a dangling link": (after(lambda root: dangling(root / "l"), *SAME, "{root}/l/out"), "x"),
    "partial a file": (after(put("out.partial", b"x"), *SAME, "{root}/out"), "x"),
    "partial a dangling link": (after(lambda root: dangling(root / "out.partial"), *SAME, "{root}/out"), "x"),
    "out empty": (words(*SAME, ""), "x"),
    "base empty": (words("", "{root}/adapter", "{root}/out"), "x"),
    "adapter empty name": (words("{root}/base", "", "{root}/out"), "x"),
    "out root": (words(*SAME, "/"), "x"),
    "out .": (words(*SAME, "."), "x"),
    "out ..": (words(*SAME, ".."), "x"),
    "out long": (words(*SAME, "{root}/" + "x" * 300), "x"),
    "out long with .partial": (words(*SAME, "{root}/" + "x" * 250), "x"),
    "out NUL": (words(*SAME, "{root}/a\0b"), "x"),
    "base NUL": (words("a\0b", "{root}/adapter", "{root}/out"), "x"),
    "base long": (words("x" * 5000, "{root}/adapter", "{root}/out"), "x"),
    "base newline": (words("a\nb", "{root}/adapter", "{root}/out"), "x"),
    "out tilde": (words(*SAME, "~nobody-such/x"), "x"),
    "base tilde": (words("~nobody-such/x", "{root}/adapter", "{root}/out"), "x"),
    "base a file": (words("{root}/base/config.json", "{root}/adapter", "{root}/out"), "x"),
    "base a pipe": (after(lambda root: os.mkfifo(root / "f"), "{root}/f", "{root}/adapter", "{root}/out"), "x"),
    "adapter a pipe itself": (after(lambda root: os.mkfifo(root / "f"), "{root}/base", "{root}/f", "{root}/out"), "x"),
    "base a loop": (after(lambda root: loop(root / "l"), "{root}/l", "{root}/adapter", "{root}/out"), "x"),
    "base an empty folder": (after(lambda root: (root / "l").mkdir(), "{root}/l", "{root}/adapter", "{root}/out"), "x"),
    "adapter an empty folder": (after(lambda root: (root / "l").mkdir(), "{root}/base", "{root}/l", "{root}/out"), "x"),
    "hub offline": (words("org/name", "{root}/adapter", "{root}/out"), "x"),
    "hub odd": (words("hf://", "{root}/adapter", "{root}/out"), "x"),
    "hub odd 2": (words("hf://../..", "{root}/adapter", "{root}/out"), "x"),
    "hub odd 3": (words("--/--", "{root}/adapter", "{root}/out"), "x"),
}  # fmt: skip
