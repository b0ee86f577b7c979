"""Files as people and attackers have them: names that collide, many shards, large side files, links that lead elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dora_convert
from dora_convert.errors import DoraConvertError

from .toy import Base, contents, load, make_adapter, write_json, write_shards

ROOT = Path(__file__).parents[1]
LONG = "m." + "x" * 240


def command(*words, prelude="", timeout=60, **environment):
    """A command line in a process of its own, after some statements."""
    code = f"{prelude}\nfrom dora_convert.cli import main\nmain()"
    known = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        check=False, capture_output=True, text=True, timeout=timeout, env=known,
    )  # fmt: skip


# tensors whose files would share a name


def named(root: Path, modules) -> tuple[Path, Path]:
    """A base of such modules and a DoRA on all of them."""
    torch.manual_seed(3)
    root.mkdir()
    tensors = {f"{module}.weight": torch.randn(24, 16).bfloat16() for module in modules}
    (root / "base").mkdir()
    save_file(tensors, root / "base/model.safetensors", {"format": "pt"})
    write_json(root / "base/config.json", {"architectures": ["X"]})
    return root / "base", make_adapter(
        root / "adapter", Base(root / "base", tensors), dora=True, targets=("weight", "")
    )


@pytest.mark.parametrize(
    "modules",
    [
        ("a." + LONG, "b." + LONG),
        ("model.Proj", "model.proj"),
        ("a.%2Fb", "a./b"),
        ("a" * 230, "a" * 230 + "b"),
        ("ä" * 60, "ö" * 60),
        ("x\u00e9", "xe\u0301"),
    ],
    ids=["long", "case", "quotes", "length", "many bytes", "normal forms"],
)
def test_names_that_a_file_system_takes_for_one(tmp_path, modules):
    """In place, tensors are saved one by one: each under a name of its own, whatever the file system holds to be equal.

    Killed when both are saved, the two files are there and have names that differ in more than case and normal form.
    """
    base, adapter = named(tmp_path / "case", modules)
    shutil.copytree(base, tmp_path / "before")
    dora_convert.merge(base, adapter, tmp_path / "out", undo="exact")
    seen = tmp_path / "seen"
    spy = f"""
import os, unicodedata
rename = os.rename
def kept(a, b, **k):
    if str(b).endswith('.safetensors') is False and '.dora-convert-in-place' in str(b) and '/old/' in str(b):
        open({str(seen)!r}, 'a').write(os.path.basename(b) + chr(10))
    return rename(a, b, **k)
os.rename = kept
"""
    done = command("merge", "--in-place", base, adapter, prelude=spy)
    assert done.returncode == 0, done.stderr
    assert load(base).keys() == load(tmp_path / "out").keys()
    assert all(torch.equal(load(base)[name], tensor) for name, tensor in load(tmp_path / "out").items())
    names = seen.read_text().splitlines() if seen.exists() else []
    folded = {name.casefold() for name in names}
    assert len(folded) == len(names)
    assert all(name.isascii() for name in names)
    dora_convert.unmerge(base, adapter, in_place=True)
    assert contents(base) == contents(tmp_path / "before")


# many files


@pytest.mark.parametrize("verb", ["merge", "verify", "unmerge", "merge in place", "push", "extract"])
def test_more_shards_than_files_may_be_open(tmp_path, verb):
    """A checkpoint of more shards than a process may hold open: files are opened as they are needed."""
    torch.manual_seed(4)
    base = tmp_path / "base"
    base.mkdir()
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(12, 8).bfloat16() for n in range(70)}
    write_shards(base, tensors, 70)
    write_json(base / "config.json", {"architectures": ["X"]})
    adapter = make_adapter(tmp_path / "adapter", Base(base, tensors), dora=True, rank=2)
    out, merged = tmp_path / "out", tmp_path / "merged"
    if verb not in ("merge", "merge in place"):
        dora_convert.merge(base, adapter, merged)
    words = {
        "merge": ["merge", base, adapter, out],
        "verify": ["verify", base, adapter, merged],
        "unmerge": ["unmerge", merged, adapter, out],
        "merge in place": ["merge", "--in-place", base, adapter],
        "push": ["push", merged, "me/merged", "--dry-run"],
        "extract": ["extract", base, merged, out, "--rank", "2"],
    }[verb]
    limit = "import torch, resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    done = command(*words, prelude=limit)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("limit", [10, 14, 20])
def test_hardly_any_file_may_be_open(tmp_path, base, adapter, limit):
    """Too few even for that: the cause is named, and what raises the limit."""
    few = f"import torch, resource; import dora_convert.cli.merge; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))"
    done = command("merge", base.path, adapter, tmp_path / "out", prelude=few)
    if done.returncode:
        assert done.returncode == 2, done.stderr
        assert "this is a bug" not in done.stderr
        assert "Traceback" not in done.stderr
        assert "open files" in done.stderr.lower()
        assert "ulimit -n" in done.stderr
        assert not (tmp_path / "out").exists()


# large side files, within little memory


def limited(limit, *words):
    """A command that may take so many bytes more than after its imports."""
    prelude = f"""
import resource, torch, dora_convert
from dora_convert import merge, inspect
held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + {limit}, held + {limit}))
"""
    return command(*words, "--workers", "1", prelude=prelude)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
@pytest.mark.parametrize("where", ["base/notes.txt", "adapter/tokenizer.json", "base/README.md", "both/tokenizer.json"])
def test_large_side_files_are_copied_in_pieces(tmp_path, base, adapter, where):
    """A side file of half a gigabyte takes no memory: copied, hashed and compared in pieces."""
    for folder in ("base", "adapter") if where.startswith("both") else (where.split("/")[0],):
        with (tmp_path / folder / where.split("/")[1]).open("wb") as file:
            file.truncate(500_000_000)
    done = limited(
        400_000_000, "merge", base.path, adapter, tmp_path / "out", "--undo", "none", "--max-memory", "32MiB"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
@pytest.mark.parametrize(
    "where", ["base/config.json", "base/model.safetensors.index.json", "adapter/adapter_config.json"]
)
def test_large_json_is_refused_before_it_is_read(tmp_path, base, adapter, where):
    """JSON has a limit of bytes, as headers have: the message names file and limit."""
    path = tmp_path / where
    with path.open("r+b") as file:
        file.truncate(2_000_000_000)
    done = limited(1_200_000_000, "merge", base.path, adapter, tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert path.name in done.stderr
    assert "too little memory" not in done.stderr
    assert "MB" in done.stderr or "MiB" in done.stderr or "bytes" in done.stderr


# links


@pytest.fixture
def secret(tmp_path):
    """A file of the user's that no model needs."""
    path = tmp_path / "private/secret.txt"
    path.parent.mkdir()
    path.write_text('{"secret": "hf_secret"}')
    return path


def holds(folder: Path, what=b"hf_secret") -> bool:
    return any(what in data for data in contents(folder).values())


@pytest.mark.parametrize(
    ("where", "name", "how"),
    [
        ("base", "tokenizer.json", "absolute"),
        ("base", "notes.txt", "relative"),
        ("base", "sub/notes.txt", "relative"),
        ("base", "notes.txt", "chain"),
        ("base", "notes", "folder"),
        ("base", "README.md", "absolute"),
        ("base", "config.json", "absolute"),
        ("adapter", "tokenizer.json", "absolute"),
        ("adapter", "chat_template.jinja", "chain"),
        ("adapter", "README.md", "absolute"),
        ("adapter", "additional_chat_templates/a.jinja", "relative"),
    ],
)
def test_links_out_of_the_folder_are_not_copied(tmp_path, base, adapter, secret, name, where, how):
    """A link to a file elsewhere is refused by name, or left out with a notice; its target's bytes are not in OUT."""
    link = tmp_path / where / name
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    if how == "folder":
        link = link.with_name("linked")
        link.symlink_to(secret.parent)
    elif how == "chain":
        (link.parent / "first").symlink_to(secret)
        link.symlink_to("first")
    else:
        link.symlink_to(secret if how == "absolute" else os.path.relpath(secret, link.parent))
    said = []
    try:
        dora_convert.merge(base.path, adapter, tmp_path / "out", on_notice=said.append)
    except DoraConvertError as error:
        said += [error.text(), error.hint or ""]
        assert not (tmp_path / "out").exists()
    else:
        assert not holds(tmp_path / "out")
    if name != "README.md":  # which has a card in its place
        assert any(link.name in text for text in said), said
        assert how == "folder" or name == "config.json" or any("follow_links=True" in text for text in said)


def test_links_are_followed_where_it_is_asked_for(tmp_path, base, adapter, secret, run):
    """--follow-links, and follow_links=True: a regular file elsewhere is copied."""
    (base.path / "notes.txt").symlink_to(secret)
    code, _, err = run("merge", base.path, adapter, tmp_path / "out", "--follow-links")
    assert code == 0, err
    assert (tmp_path / "out/notes.txt").read_text() == secret.read_text()
    assert not (tmp_path / "out/notes.txt").is_symlink()
    dora_convert.merge(base.path, adapter, tmp_path / "again", follow_links=True)
    assert holds(tmp_path / "again")


@pytest.mark.parametrize(
    "target",
    ["/proc/self/environ", "/proc/self/maps", "/dev/zero", "/dev/null", "/dev/fd/0", "/sys/kernel/uevent_seqnum"],
)
@pytest.mark.parametrize("options", [(), ("--follow-links",)], ids=["", "followed"])
def test_devices_and_proc_are_never_followed(tmp_path, base, adapter, target, options):
    """Not even with --follow-links: these are no files, and hold the user's secrets or have no end."""
    if not Path(target).exists():
        pytest.skip("this system has none")
    (base.path / "notes.txt").symlink_to(target)
    done = command("merge", base.path, adapter, tmp_path / "out", *options, HF_TOKEN="hf_secret")
    assert done.returncode in (0, 2), done.stderr
    assert "No such option" not in done.stderr
    if target.startswith(("/proc", "/sys")):  # what no file is at all is passed over
        assert "notes.txt" in done.stderr
    if done.returncode == 0:
        assert not (tmp_path / "out/notes.txt").exists()
        assert not holds(tmp_path / "out")


def test_links_inside_are_followed(tmp_path, base, adapter):
    """A link to another file of the folder is the file."""
    (base.path / "vocab.json").write_text("{}")
    (base.path / "copy.json").symlink_to("vocab.json")
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert (tmp_path / "out/copy.json").read_text() == "{}"
    assert not (tmp_path / "out/copy.json").is_symlink()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_hub_cache_is_made_of_links(tmp_path, base, adapter, depth):
    """snapshots/COMMIT/file leads to blobs/HASH of the same repository, from sub-folders, too; another's is refused."""
    snapshot, blobs = tmp_path / "models--org--base/snapshots/abc", tmp_path / "models--org--base/blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(base.path, snapshot)
    (snapshot / "a").mkdir()
    (snapshot / "a/notes.txt").write_text("notes")
    for number, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        path.rename(blobs / f"{number}")
        path.symlink_to(os.path.relpath(blobs / f"{number}", path.parent))
    dora_convert.merge(snapshot, adapter, tmp_path / "out")
    assert (tmp_path / "out/a/notes.txt").read_text() == "notes"
    other = tmp_path / "models--org--private/blobs/0"
    other.parent.mkdir(parents=True)
    other.write_text("hf_secret")
    (snapshot / "stolen.txt").symlink_to(os.path.relpath(other, snapshot))
    try:
        dora_convert.merge(snapshot, adapter, tmp_path / "again")
    except DoraConvertError:
        return
    assert not holds(tmp_path / "again")


@pytest.mark.parametrize("options", [(), ("--follow-links",)], ids=["", "followed"])
def test_push_refuses_links(tmp_path, base, adapter, secret, run, options):
    """What is uploaded is what lies in the folder: a link is refused by name."""
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    (tmp_path / "out/notes.txt").symlink_to(secret)
    code, out, err = run("push", tmp_path / "out", "me/out", "--dry-run")
    assert (code, out) == (2, ""), out
    assert "notes.txt" in err
    assert "link" in err


def test_weights_that_are_links_to_elsewhere(tmp_path, base, adapter):
    """People keep weights on another disk and link them: that goes on, for only tensors are read from them."""
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    for path in base.path.glob("*.safetensors"):
        path.rename(elsewhere / path.name)
        path.symlink_to(elsewhere / path.name)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert load(tmp_path / "out").keys() == base.tensors.keys()


def test_links_in_a_record_are_not_followed(tmp_path, base, adapter, secret):
    """Nor do links arrive by way of dora_convert/, which a second merge keeps, or in what unmerge gives back."""
    dora_convert.merge(base.path, adapter, tmp_path / "out", undo="exact")
    (tmp_path / "out/dora_convert/more.json").symlink_to(secret)
    for verb, out in ((dora_convert.merge, "twice"), (dora_convert.unmerge, "back")):
        try:
            verb(tmp_path / "out", adapter, tmp_path / out)
        except DoraConvertError:
            continue
        assert not holds(tmp_path / out)


def test_adapter_files_that_are_links(tmp_path, base, secret):
    """from-lora and to-lora copy an adapter's tokenizer, too."""
    lora = make_adapter(tmp_path / "lora", base, dora=False)
    (lora / "tokenizer.json").symlink_to(secret)
    for verb, options in ((dora_convert.from_lora, {}), (dora_convert.to_lora, {"rank": 2})):
        out = tmp_path / verb.__name__
        try:
            verb(base.path, lora, out, **options)
        except DoraConvertError:
            continue
        assert not holds(out)
