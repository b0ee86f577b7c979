"""Addresses of stores, of the Hub and of anything else: read, written, or refused; never taken for a folder here."""

from __future__ import annotations

from pathlib import Path

import pytest

import dora_convert
from dora_convert import settings
from dora_convert.errors import OutputError, RefError

from .toy import make_adapter, make_base

ADDRESSES = [
    "memory://bucket/x", "s3:/bucket/x", "s3://bucket/x", "S3://bucket/x", "s3a://bucket/x", "gs://bucket/x",
    "az://container/x", "abfs://container/x", "hf://org/x", "https://huggingface.co/org/x", "file:///x", "odd+1://x",
    "hf:/org/x", "memory:/bucket/x",
]  # fmt: skip
OUT = {
    "merge": ("base", "adapter"),
    "unmerge": ("merged", "adapter"),
    "from-lora": ("base", "lora"),
    "to-lora": ("base", "adapter", "--rank", "2"),
    "extract": ("base", "merged", "--rank", "2"),
    "convert": ("adapter", "--to", "kohya"),
}
"""The words of every verb that writes a folder, but OUT."""
IN = {
    "merge": ("base", "adapter", "out"),
    "merge --in-place": ("base", "adapter"),
    "unmerge": ("merged", "adapter", "out"),
    "unmerge --in-place": ("merged", "adapter"),
    "from-lora": ("base", "lora", "out"),
    "to-lora --rank 2": ("base", "adapter", "out"),
    "extract --rank 2": ("base", "merged", "out"),
    "convert --to kohya": ("adapter", "out"),
    "convert --to kohya adapter out --base": ("base",),
    "verify": ("base", "adapter", "merged"),
    "analyze": ("base", "merged"),
    "inspect": ("base",),
    "push": ("merged", "org/name"),
}
"""The words of every verb, with its options before them."""
FILES = {
    "verify base adapter merged": ("--report",),
    "inspect base": ("--report",),
    "analyze base merged": ("--plot", "--csv"),
}
"""Options that name a file to write."""
UNREAD = ["memory://bucket/x", "s3:/bucket/x", "S3://bucket/x", "file:///x", "odd+1://x"]
"""Addresses that no verb reads, or for which a package is missing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two adapters and a merge; no test changes them."""
    root = tmp_path_factory.mktemp("addresses")
    base = make_base(root / "base", layers=1, shards=1)
    make_adapter(root / "adapter", base, dora=True)
    make_adapter(root / "lora", base, dora=False)
    dora_convert.merge(base.path, root / "adapter", root / "merged", undo="exact")
    return root


@pytest.fixture
def refused(folder, run, monkeypatch):
    """Run a command line that must be refused as a user's mistake, with nothing written; return its message."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(settings, "_is_installed", lambda name: name not in ("s3fs", "gcsfs", "adlfs"))

    def call(*words):
        before = sorted(folder.rglob("*"))
        code, out, err = run(*words)
        assert (code, out) == (2, ""), (words, err)
        assert "a bug" not in err, (words, err)
        assert sorted(folder.rglob("*")) == before, words
        return err

    return call


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("verb", OUT)
def test_out(refused, verb, dry):
    """Only merge writes to a store, for which it needs a package; no verb makes a folder of an address's name."""
    for address in ADDRESSES:
        said = refused(verb, *OUT[verb], address, *(["--dry-run"] if dry else []))
        if verb == "merge" and address.startswith(("s3:", "gs:", "az:")):
            assert "not installed" in said
        else:
            assert f"OUT {address}" in said


@pytest.mark.parametrize("verb", IN)
def test_inputs(refused, verb):
    """Every word that names an input, one at a time."""
    first, *options = verb.split()
    for place in range(len(IN[verb])):
        if IN[verb][place] in ("out", "org/name"):
            continue
        for address in UNREAD:
            words = [*IN[verb][:place], address, *IN[verb][place + 1 :]]
            said = refused(first, *options, *words)
            assert address in said, (words, said)


@pytest.mark.parametrize("words", FILES)
def test_files(refused, words):
    """A report, a picture and a table are files on this machine."""
    for option in FILES[words]:
        for address in ADDRESSES:
            assert f"{address}.html: it is an address" in refused(*words.split(), option, f"{address}.html")


@pytest.mark.parametrize(
    ("address", "meant"),
    [("S3://bucket/x", "s3://bucket/x"), ("s3a://bucket/x", "s3://bucket/x"), ("abfss://c/x", "az://c/x")],
)
def test_other_spellings_of_a_store(refused, address, meant):
    """Hadoop's schemes, and capital letters, are told as they are written here."""
    assert f"did you mean {meant}?" in refused("merge", "base", "adapter", address)
    assert f"did you mean {meant}?" in refused("merge", address, "adapter", "out")


def test_a_store_without_a_bucket(folder, store, tmp_path):
    """s3:// alone is no folder of a store."""
    for words in (
        (folder / "base", folder / "adapter", "memory://"),
        ("memory://", folder / "adapter", tmp_path / "out"),
    ):
        with pytest.raises((RefError, OutputError), match="names no bucket"):
            dora_convert.merge(*words)


def test_a_path_is_an_address_too(folder, store):
    """pathlib takes one of the slashes away."""
    report = dora_convert.merge(folder / "base", folder / "adapter", Path("memory://bucket/out"))
    assert report.out == report.pushed.url == "memory://bucket/out"
    assert dora_convert.inspect(Path("memory://bucket/out")).kind == "checkpoint"


def test_a_folder_whose_name_has_a_colon(folder, tmp_path, monkeypatch):
    """A folder stays one: ./ before it says so."""
    monkeypatch.chdir(tmp_path)
    dora_convert.merge(folder / "base", folder / "adapter", "./run://1")
    dora_convert.merge(folder / "base", folder / "adapter", "step:1")
    assert (tmp_path / "run:/1/config.json").is_file()
    assert (tmp_path / "step:1/config.json").is_file()
