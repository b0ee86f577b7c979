"""Every way an input can be broken: exit code 2, a few clear lines, nothing under OUT's name, and inputs as they were."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_convert.cli import main

from .toy import edit_json, make_adapter, make_base

SHARD, OTHER = "base/model-00001-of-00002.safetensors", "base/model-00002-of-00002.safetensors"
INDEX, CONFIG = "base/model.safetensors.index.json", "base/config.json"
TENSORS, SETTINGS = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"
UP = "base_model.model.model.layers.0.mlp.up_proj"
COMMAND = [Path(sys.executable).with_name("dora-convert"), "merge"]
BOTH = "{root}/base", "{root}/adapter"
SECONDS = 60
"""More than any of this takes: a command that waits for a pipe is stopped then."""


def put(name, data):
    """A file of other bytes, or of another JSON value."""
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    return lambda root: (root / name).write_bytes(raw)


def fields(name, **changed):
    """A JSON file with some fields changed."""
    return lambda root: edit_json(root / name, **changed)


def cut(name, length, more=b""):
    """A file's first bytes, or all but some of its last, and perhaps others."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:length] + more)


def header(name, change):
    """A safetensors file with another header: `change` gets its entries, and returns others or raw JSON."""

    def act(root):
        raw = (root / name).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        changed = change(json.loads(raw[8:end]))
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        (root / name).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    return act


def entry(**changed):
    """A shard where the first tensor is declared otherwise; `shift` moves the last one."""
    by = changed.pop("shift", 0)

    def change(entries):
        place = {key: value["data_offsets"] for key, value in entries.items() if key != "__metadata__"}
        key = max(place, key=place.get) if by else min(place, key=place.get)
        moved = {"data_offsets": [each + by for each in place[key]]} if by else {}
        return entries | {key: entries[key] | moved | changed}

    return header(SHARD, change)


def tensors(change, name=TENSORS):
    """A safetensors file with other tensors: `change` gets all of them, and changes them or returns others."""

    def act(root):
        found = load_file(root / name)
        made = change(found)
        save_file(made if isinstance(made, dict) else found, root / name, {"format": "pt"})

    return act


def parts(**changed):
    """An adapter where one module's tensors A, B and m are others, or None for gone."""
    suffixes = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
    found = {f"{UP}.{suffixes[part]}": tensor for part, tensor in changed.items()}
    return tensors(lambda all_: {k: v for k, v in (all_ | found).items() if v is not None})


def file_of(filename, tensor=None):
    """An index whose first tensor, or another, lies in a file of that name."""

    def act(root):
        table = json.loads((root / INDEX).read_text())["weight_map"]
        edit_json(root / INDEX, weight_map=table | {tensor or min(table): filename.format(root=root)})

    return act


def instead(name, make):
    """Something else in the place of a file: `make` gets its path."""

    def act(root):
        (root / name).unlink(missing_ok=True)
        make(root / name)

    return act


def loop(path):
    path.symlink_to(path.name)


def dangling(path):
    path.symlink_to("nowhere")


def words(*chosen, first=lambda _: None):
    """Another command line, perhaps with something prepared."""

    def act(root):
        first(root)
        return [word.format(root=root) for word in chosen]

    return act


def made(name, make):
    """Something that is there besides: `make` gets its path."""
    return lambda root: make(root / name)


def escaping(root):
    """An index that names a file outside of the folder, which is there and would do."""
    shutil.move(root / SHARD, root / "x.safetensors")
    table = json.loads((root / INDEX).read_text())["weight_map"]
    edit_json(root / INDEX, weight_map={k: "../x.safetensors" if v in SHARD else v for k, v in table.items()})


def huge(digits):
    return b'{"a": {"dtype": "F32", "shape": [1%s], "data_offsets": [0, 4]}}' % (b"0" * digits)


ROWS = {
    # a base's weights
    "empty": (put(SHARD, b""), "is empty"),
    "seven bytes": (put(SHARD, b"1234567"), "not a safetensors file"),
    "only a length": (put(SHARD, bytes(8)), "not valid JSON"),
    "truncated header": (cut(SHARD, 100), "truncated"),
    "truncated body": (cut(OTHER, -1), "truncated"),
    "trailing bytes": (cut(SHARD, None, b"\0"), "trailing"),
    "length bomb": (put(SHARD, b"\xff" * 8 + b"{}"), "cannot hold a header"),
    "overlap": (entry(shift=-4), "does not start where"),
    "gap": (entry(shift=4), "does not start where"),
    "wrong dtype": (entry(dtype="F64"), "which is not"),
    "unknown dtype": (entry(dtype="F31"), "unknown dtype"),
    "dtype in a list": (entry(dtype=["F32"]), "malformed"),
    "wrong shape": (entry(shape=[3, 5]), "which is not"),
    "negative shape": (entry(shape=[-72, -40]), "not valid JSON"),
    "float shape": (entry(shape=[72.0, 40]), "not valid JSON"),
    "bool shape": (entry(shape=[True, 2880]), "malformed"),
    "text shape": (entry(shape="72x40"), "malformed"),
    "huge shape": (entry(shape=[2**62, 2**62]), "which is not"),
    "huge and empty shape": (entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), "which is not"),
    "shape bomb": (entry(shape=[10**18] * 20_000), "20000 dimensions"),
    "number bomb": (header(SHARD, lambda _: huge(4000)), "not valid JSON"),
    "larger number bomb": (header(SHARD, lambda _: huge(1_000_000)), "not valid JSON"),
    "offsets reversed": (entry(data_offsets=[5760, 0]), "which is not"),
    "one offset": (entry(data_offsets=[0]), "malformed"),
    "no offsets": (entry(data_offsets=None), "malformed"),
    "offsets beyond the file": (entry(data_offsets=[10**15, 10**15 + 5760]), "does not start where"),
    "a field too many": (entry(strides=[1, 2]), "malformed"),
    "NaN as a number": (entry(shape=[float("nan")]), "not valid JSON"),
    "deep nesting": (header(SHARD, lambda _: b"[" * 100_000), "not valid JSON"),
    "deep objects": (header(SHARD, lambda _: b'{"a":' * 100_000), "not valid JSON"),
    "a name twice": (header(SHARD, lambda _: b'{"a": 1, "a": 2}'), "twice"),
    "not UTF-8": (header(SHARD, lambda _: b'{"\xff\xfe": 1}'), "not valid JSON"),
    "UTF-16": (header(SHARD, lambda entries: json.dumps(entries).encode("utf-16")), "not valid JSON"),
    "byte order mark": (header(SHARD, lambda entries: json.dumps(entries).encode("utf-8-sig")), "not valid JSON"),
    "half a surrogate": (header(SHARD, lambda _: b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'), "not valid JSON"),
    "metadata of numbers": (header(SHARD, lambda entries: entries | {"__metadata__": {"format": 1}}), "__metadata__"),
    "header of a list": (header(SHARD, lambda entries: [entries]), "not a JSON object"),
    "header of null": (header(SHARD, lambda _: b"null"), "not a JSON object"),
    "weights by LFS": (put(SHARD, POINTER), "Git LFS pointer"),
    "a web page": (put(SHARD, b"<!DOCTYPE html><html><body>404</body></html>"), "an HTML page"),
    "a shard is a folder": (instead(SHARD, Path.mkdir), "is a folder"),
    "a shard is a pipe": (instead(SHARD, os.mkfifo), "is a pipe"),
    "a shard is a loop": (instead(SHARD, loop), "missing"),
    "a shard leads nowhere": (instead(SHARD, dangling), "missing"),
    "a shard twice": (lambda root: shutil.copy(root / SHARD, root / OTHER), "not in model-00002"),
    "NaN in the base": (tensors(lambda all_: {k: v * float("nan") for k, v in all_.items()}, SHARD), "holds NaN or Inf"),
    # its index
    "index leaves the folder": (escaping, "not a plain file name"),
    "index is absolute": (file_of("{root}/" + SHARD), "not a plain file name"),
    "index into a sub-folder": (file_of("sub/x.safetensors"), "not a plain file name"),
    "index with a backslash": (file_of("..\\model.safetensors"), "not a plain file name"),
    "index of nothing": (file_of(""), "not a plain file name"),
    "index of .": (file_of("."), "not a plain file name"),
    "index of ..": (file_of(".."), "not a plain file name"),
    "index with NUL": (file_of("a\0b.safetensors"), "a\\x00b.safetensors"),
    "index with a line break": (file_of("a\nb.safetensors"), "a\\nb.safetensors"),
    "index of half a surrogate": (put(INDEX, b'{"weight_map": {"a": "\\ud800.safetensors"}}'), "\\ud800.safetensors"),
    "index with a long name": (file_of("x" * 5000 + ".safetensors"), "not a plain file name"),
    "index of a missing file": (file_of("gone.safetensors"), "gone.safetensors"),
    "index of a folder": (lambda root: ((root / "base/x.safetensors").mkdir(), file_of("x.safetensors")(root)), "is a folder"),
    "index of another kind of file": (file_of("config.json"), "config.json"),
    "index of the wrong file": (file_of("model-00002-of-00002.safetensors", "model.embed_tokens.weight"), "not in model-00002"),
    "index of a missing tensor": (file_of("model-00001-of-00002.safetensors", "ghost.weight"), "not in model-00001"),
    "index of numbers": (put(INDEX, {"weight_map": {"a": 5}}), "must map tensor names to file names"),
    "index of a list": (put(INDEX, {"weight_map": ["a"]}), "must map tensor names to file names"),
    "index without a map": (put(INDEX, {"metadata": {}}), "must map tensor names to file names"),
    "index of no tensors": (put(INDEX, {"weight_map": {}}), "tensor"),
    "index is a list": (put(INDEX, []), "must hold a JSON object"),
    "index truncated": (cut(INDEX, 100), "cannot be read as JSON"),
    "index empty": (put(INDEX, b""), "cannot be read as JSON"),
    "index by LFS": (put(INDEX, POINTER), "Git LFS pointer"),
    "index is a pipe": (instead(INDEX, os.mkfifo), "is a pipe"),
    "index is a folder": (instead(INDEX, Path.mkdir), "folder"),
    # config.json and adapter_config.json, alike
    **{
        f"{name} of {what}": (put(name, data), message)
        for name in (CONFIG, SETTINGS)
        for what, data, message in (
            ("nothing", b"", "cannot be read as JSON"),
            ("a list", [], "must hold a JSON object"),
            ("text", "llama", "must hold a JSON object"),
            ("a number", 5, "must hold a JSON object"),
            ("null", None, "must hold a JSON object"),
            ("half", b'{"a": 1', "cannot be read as JSON"),
            ("two", b"{}{}", "cannot be read as JSON"),
            ("bytes", b"\x80\x04\x95", "cannot be read as JSON"),
            ("depth", b'{"a":' * 100_000, "cannot be read as JSON"),
            ("digits", b'{"r": 1%s}' % (b"0" * 10_000), "cannot be read as JSON"),
            ("LFS", POINTER, "Git LFS pointer"),
        )
    },
    "side file whose name is no text": (lambda root: (root / "base" / os.fsdecode(b"\xff.txt")).touch(), "\\udcff.txt"),
    "config is a pipe": (instead(CONFIG, os.mkfifo), "is a pipe"),
    "config is a folder": (instead(CONFIG, Path.mkdir), "folder"),
    "config is a loop": (instead(CONFIG, loop), "config.json"),
    "config leads nowhere": (instead(CONFIG, dangling), "config.json"),
    **{
        f"{key} {value!r}": (fields(CONFIG, **{key: value}), key)
        for key, value in (
            ("architectures", 5), ("architectures", "LlamaForCausalLM"), ("model_type", []), ("vocab_size", "many"),
            ("tie_word_embeddings", "yes"), ("text_config", []), ("torch_dtype", 5), ("quantization_config", "fp8"),
        )
    },
    "adapter config is a pipe": (instead(SETTINGS, os.mkfifo), "adapter_config.json"),
    "adapter config leads nowhere": (instead(SETTINGS, dangling), "adapter_config.json"),
    **{
        f"{key} {str(value)[:20]}": (fields(SETTINGS, **{key: value}), key)
        for key, value in (
            ("r", 0), ("r", -1), ("r", 1.5), ("r", True), ("r", "8"), ("r", []), ("use_dora", "yes"), ("use_dora", 1),
            ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("lora_alpha", 0), ("lora_alpha", -1e400),
            ("lora_alpha", "16"), ("lora_alpha", True), ("lora_alpha", 10**400), ("use_rslora", "no"),
            ("rank_pattern", []), ("rank_pattern", {"up_proj": "4"}), ("rank_pattern", {"up_proj": 0}),
            ("rank_pattern", {"(": 4}), ("alpha_pattern", 5), ("alpha_pattern", {"up_proj": float("nan")}),
            ("modules_to_save", "lm_head"), ("modules_to_save", [5]), ("base_model_name_or_path", 5), ("revision", 5),
            ("peft_type", None), ("peft_type", ["LORA"]), ("peft_type", 5), ("peft_type", "PREFIX_TUNING"),
            ("bias", 5), ("bias", "some"), ("init_lora_weights", "magic"), ("layer_replication", 5),
            ("layer_replication", [[0, 10**12]]), ("trainable_token_indices", {"a": "b"}), ("target_parameters", [5]),
            ("a_new_field", 1),
        )
    },
    "another rank": (fields(SETTINGS, r=5), "the config says rank 5"),
    "a huge rank": (fields(SETTINGS, rank_pattern={"up_proj": 10**30}), "rank_pattern"),
    "overflow of alpha": (fields(SETTINGS, lora_alpha=1e308), "overflow"),
    # an adapter's tensors
    "adapter by LFS": (put(TENSORS, POINTER), "Git LFS pointer"),
    "adapter truncated": (cut(TENSORS, -3), "truncated"),
    "adapter missing": (made(TENSORS, Path.unlink), "no adapter_model"),
    "adapter without tensors": (tensors(lambda _: {}), "holds no tensors"),
    "adapter is a folder": (instead(TENSORS, Path.mkdir), "is a folder"),
    "adapter is a pipe": (instead(TENSORS, os.mkfifo), "is a pipe"),
    "adapter leads nowhere": (instead(TENSORS, dangling), "adapter_model"),
    "no A": (parts(A=None), "has no lora_A"),
    "no B": (parts(B=None), "has no lora_B"),
    "no m": (parts(m=None), "no lora_magnitude_vector"),
    "m without use_dora": (fields(SETTINGS, use_dora=False), "use_dora is not set"),
    "only m": (parts(A=None, B=None), "has no lora_A"),
    "NaN": (parts(A=torch.full((4, 40), float("nan"))), f"{UP}.lora_A.weight"),
    "Inf": (parts(B=torch.full((96, 4), float("inf"))), f"{UP}.lora_B.weight"),
    "A of another width": (parts(A=torch.ones(4, 41)), f"{UP}.lora_A.weight"),
    "B of another height": (parts(B=torch.ones(95, 4)), f"{UP}.lora_B.weight"),
    "B transposed": (parts(B=torch.ones(4, 96)), "lora_B is (4, 96)"),
    "m of another length": (parts(m=torch.ones(40)), "magnitude"),
    "m a matrix": (parts(m=torch.ones(96, 2)), "magnitude"),
    "m a scalar": (parts(m=torch.tensor(1.0)), "magnitude"),
    "A a vector": (parts(A=torch.ones(160)), "lora_A is (160,)"),
    "rank zero": (parts(A=torch.ones(0, 40), B=torch.ones(96, 0)), "lora_A.weight is empty"),
    "integers": (parts(A=torch.ones(4, 40, dtype=torch.int32)), "I32"),
    "fp8": (parts(A=torch.ones(4, 40).to(torch.float8_e4m3fn)), "F8_E4M3"),
    "a module of no base": (tensors(lambda all_: {k.replace("up_proj", "upp"): v for k, v in all_.items()}), "no such module"),
    "a stray tensor": (tensors(lambda all_: all_ | {"stray": torch.ones(3)}), "stray"),
    "a tensor without a name": (tensors(lambda all_: all_ | {"": torch.ones(3)}), "1 "),
    "a line break in a name": (tensors(lambda all_: all_ | {"a\nb": torch.ones(3)}), "a\\nb"),
    "a long name": (tensors(lambda all_: all_ | {"a" * 50_000: torch.ones(3)}), "aaa"),
    "many strays": (tensors(lambda all_: all_ | {f"stray.{n}": torch.ones(3) for n in range(1000)}), "990 more"),
    # places
    "swapped": (words("{root}/adapter", "{root}/base", "{root}/out"), "are swapped"),
    "BASE for both": (words("{root}/base", "{root}/base", "{root}/out"), "is a model, not an adapter"),
    "ADAPTER for both": (words("{root}/adapter", "{root}/adapter", "{root}/out"), "adapter"),
    "OUT is BASE": (words(*BOTH, "{root}/base"), "forget OUT"),
    "OUT over BASE": (words(*BOTH, "{root}/base", "--overwrite"), "not replaced"),
    "OUT over ADAPTER": (words(*BOTH, "{root}/adapter", "--overwrite"), "not replaced"),
    "OUT over BASE by a detour": (words(*BOTH, "{root}/adapter/../base", "--overwrite"), "not replaced"),
    "OUT in BASE": (words(*BOTH, "{root}/base/out"), "overlaps"),
    "OUT in ADAPTER": (words(*BOTH, "{root}/adapter/sub/out"), "overlaps"),
    "OUT around both": (words(*BOTH, "{root}", "--overwrite"), "not replaced"),
    "OUT is a link to BASE": (words(*BOTH, "{root}/l", "--overwrite", first=made("l", lambda path: path.symlink_to("base"))), "not a folder"),
    "OUT in a link to BASE": (words(*BOTH, "{root}/l/out", first=made("l", lambda path: path.symlink_to("base"))), "overlaps"),
    "OUT exists": (words(*BOTH, "{root}/o", first=made("o", Path.mkdir)), "--overwrite"),
    "OUT is a thesis": (words(*BOTH, "{root}/o", "--overwrite", first=lambda root: ((root / "o").mkdir(), put("o/thesis.txt", b"x")(root))), "was not written by dora-convert"),
    "OUT is a file": (words(*BOTH, "{root}/f", "--overwrite", first=put("f", b"")), "not a folder"),
    "OUT is a pipe": (words(*BOTH, "{root}/f", "--overwrite", first=made("f", os.mkfifo)), "not a folder"),
    "OUT leads nowhere": (words(*BOTH, "{root}/l", "--overwrite", first=made("l", dangling)), "not a folder"),
    "OUT is a loop": (words(*BOTH, "{root}/l", first=made("l", loop)), "is a link"),
    "OUT in a file": (words(*BOTH, "{root}/f/out", first=put("f", b"")), "is not a folder"),
    "OUT in a loop": (words(*BOTH, "{root}/l/a/out", first=made("l", loop)), "is not a folder"),
    "OUT.partial is a file": (words(*BOTH, "{root}/o", first=put("o.partial", b"")), "not an unfinished output"),
    "OUT.partial leads nowhere": (words(*BOTH, "{root}/o", first=made("o.partial", dangling)), "not an unfinished output"),
    "OUT is nothing": (words(*BOTH, ""), "OUT"),
    "OUT is the root": (words(*BOTH, "/"), "not a valid folder name."),
    "OUT with NUL": (words(*BOTH, "{root}/a\0b"), "not a valid folder name"),
    "OUT is long": (words(*BOTH, "{root}/" + "x" * 252), "too long"),
    "OUT is long for a run": (words(*BOTH, "{root}/" + "x" * 248), "at most 247 bytes"),
    "BASE is nothing": (words("", "{root}/adapter", "{root}/out"), "BASE is empty"),
    "ADAPTER is nothing": (words("{root}/base", "", "{root}/out"), "ADAPTER is empty"),
    "BASE with NUL": (words("a\0b", "{root}/adapter", "{root}/out"), "does not exist"),
    "BASE with a line break": (words("a\nb", "{root}/adapter", "{root}/out"), "does not exist"),
    "BASE is long": (words("x" * 5000, "{root}/adapter", "{root}/out"), "too long"),
    "BASE of nobody": (words("~nobody-such/x", "{root}/adapter", "{root}/out"), "~nobody-such/x"),
    "BASE is a config": (words("{root}/base/config.json", "{root}/adapter", "{root}/out"), "config.json"),
    "BASE is a pipe": (words("{root}/f", "{root}/adapter", "{root}/out", first=made("f", os.mkfifo)), "not a folder or a file"),
    "ADAPTER is a pipe": (words("{root}/base", "{root}/f", "{root}/out", first=made("f", os.mkfifo)), "not a folder or a file"),
    "BASE leads nowhere": (words("{root}/l", "{root}/adapter", "{root}/out", first=made("l", dangling)), "does not exist"),
    "BASE has nothing": (words("{root}/o", "{root}/adapter", "{root}/out", first=made("o", Path.mkdir)), "is empty"),
    "ADAPTER has nothing": (words("{root}/base", "{root}/o", "{root}/out", first=made("o", Path.mkdir)), "no adapter_config.json"),
    "BASE is no name": (words("hf://../..", "{root}/adapter", "{root}/out"), "not a valid repo id"),
    "BASE is not to be had": (words("org/name", "{root}/adapter", "{root}/out"), "HF_HUB_OFFLINE"),
}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """A folder with a base and an adapter."""
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"), dora=True)
    return tmp_path


def run(capsys, root, command):
    """A merge, by default of the two: (exit code, stdout, stderr); one that hangs is stopped, as a bug."""

    def hung(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    try:
        with pytest.raises(SystemExit) as left:
            main(["merge", *(command or [str(root / name) for name in ("base", "adapter", "out")])])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return left.value.code, *capsys.readouterr()


def everything(root):
    """All there is below a folder: bytes of files, targets of links, and that others are there."""
    return {
        path: path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="nothing would stop a command that hangs")
@pytest.mark.parametrize("name", ROWS)
def test_refused(capsys, root, name):
    """Exit code 2, a message of a few lines that names what is wrong, and everything as it was; as JSON, too."""
    act, message = ROWS[name]
    command = found if isinstance(found := act(root), list) else None
    before = everything(root)
    code, out, err = run(capsys, root, command)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert "this is a bug" not in err
    assert len(err.splitlines()) <= 16
    assert max(map(len, err.splitlines())) < 1000
    assert everything(root) == before
    command = command or [str(root / name) for name in ("base", "adapter", "out")]
    code, out, err = run(capsys, root, [*command, "--json"])
    assert (code, out) == (2, "")
    assert {"kind", "message", "hint"} <= json.loads(err.splitlines()[-1])["error"].keys()
    assert everything(root) == before


def test_odd_things_beside_the_weights_do_not_matter(capsys, root):
    """Pipes, loops and links to nowhere that a merge has no use for are passed over, and not waited for."""
    os.mkfifo(root / "base/notes")
    os.mkfifo(root / "adapter/tokenizer.json")
    loop(root / "base/loop")
    dangling(root / "base/gone.txt")
    (root / "base/again").symlink_to(".")
    code, _, err = run(capsys, root, None)
    assert code == 0, err
    assert not {"notes", "loop", "gone.txt"} & {path.name for path in (root / "out").iterdir()}


def test_odd_names(capsys, root):
    """Names of folders may hold anything that the system takes."""
    base, adapter, out = root / "größe 漢字", root / "a\nb 'c' \"d\" $e", root / ("ü" * 100)
    (root / "base").rename(base)
    (root / "adapter").rename(adapter)
    code, _, err = run(capsys, root, [str(base), str(adapter), str(out)])
    assert code == 0, err
    assert (out / "config.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, names are text")
def test_names_that_are_no_text(capsys, root):
    """In another encoding than the system's: BASE may be called so; OUT may not, where safetensors would not find it."""
    odd = root / os.fsdecode(b"\xff")
    (root / "base").rename(odd)
    code, _, err = run(capsys, root, [str(odd), str(root / "adapter"), str(odd / "../out\udcff")])
    assert code == 2
    assert "UTF-8" in err
    done = subprocess.run([*COMMAND, odd, root / "adapter", root / "out"], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", [SHARD, INDEX, CONFIG, TENSORS, SETTINGS, "base", "adapter", "base/tokenizer_config.json"]
)
def test_unreadable(capsys, root, name):
    """The error names a file that may not be read."""
    (root / name).chmod(0)
    try:
        if os.access(root / name, os.R_OK):
            pytest.skip("this user may read everything")
        code, out, err = run(capsys, root, None)
    finally:
        (root / name).chmod(stat.S_IRWXU)
    assert (code, out) == (2, "")
    assert Path(name).name in err
    assert "this is a bug" not in err
    assert not (root / "out").exists()


@pytest.mark.parametrize("place", [".", "old"])
def test_not_writable(capsys, root, place):
    """A folder that may not be written into, or an OUT in one that is to be replaced."""
    (root / "place").mkdir()
    out = root / "place/out"
    if place == "old":
        make_base(out)
    (root / "place").chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        if os.access(root / "place", os.W_OK):
            pytest.skip("this user may write everywhere")
        code, _, err = run(capsys, root, [str(root / "base"), str(root / "adapter"), str(out), "--overwrite"])
    finally:
        (root / "place").chmod(stat.S_IRWXU)
    assert code == 2
    assert "cannot be written" in err
