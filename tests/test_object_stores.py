"""BASE, ADAPTER and OUT in an object store: fsspec's store in memory stands for S3 and its like.

At the end of this file emulators of S3, Google Cloud Storage and Azure do, where they are installed, as in
`make cluster`. tests/oracles/stores.py does more with them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert import settings
from dora_convert.errors import OutputError, RefError, UsageError
from dora_convert.hub import store_streaming
from dora_convert.sources import object_store, range_reader

from .emulators import emulated, missing
from .toy import contents, make_adapter, make_base

BUCKET = "memory://bucket"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base and an adapter, and their merge."""
    root = tmp_path_factory.mktemp("pair")
    base = make_base(root / "base", layers=3)
    adapter = make_adapter(root / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, root / "merged")
    return base.path, adapter, root / "merged"


def upload(system, folder, name):
    """Put a folder into the store; return its address."""
    for path, data in contents(folder).items():
        system.pipe_file(f"/bucket/{name}/{path}", data)
    return f"{BUCKET}/{name}"


def stored(system, name):
    """The files of a folder of the store."""
    return {path.removeprefix(f"/bucket/{name}/"): system.cat_file(path) for path in system.find(f"/bucket/{name}")}


def weights(files):
    """All files but the receipt and the card, which name the inputs."""
    return {name: data for name, data in files.items() if not name.endswith((".json", ".md")) or "config" in name}


def fails_at(number, sent=None):
    """An upload that fails at a shard, by its number in the order of uploads."""
    put, names = object_store.ObjectStore.put, [] if sent is None else sent

    def fails(self, name, path):
        names.append(name)
        if sum(name.endswith("of-00002.safetensors") for name in names) == number:
            raise OutputError("no network")
        return put(self, name, path)

    return fails


def test_everything_in_a_store(pair, store, tmp_path):
    """Base by ranges, adapter, and output: the bytes of a local merge, and nothing else; nothing stays here."""
    base, adapter = upload(store, pair[0], "base"), upload(store, pair[1], "adapter")
    report = dora_convert.merge(base, adapter, f"{BUCKET}/out")
    assert weights(stored(store, "out")) == weights(contents(pair[2]))
    assert stored(store, "out").keys() == contents(pair[2]).keys()
    assert report.out == f"{BUCKET}/out"
    assert report.pushed.url == report.out
    assert list((tmp_path / "home").rglob("*.safetensors")) == []
    assert dora_convert.verify(base, adapter, f"{BUCKET}/out").verdict == "agree"
    dora_convert.unmerge(f"{BUCKET}/out", adapter, tmp_path / "back")
    assert contents(tmp_path / "back").keys() == contents(pair[0]).keys()


def test_the_base_is_read_by_ranges(pair, store, tmp_path, monkeypatch):
    """No weight file of it is downloaded, and the output here is that of a local merge."""
    base = upload(store, pair[0], "base")
    fetched = []
    fetch = object_store.ObjectStore.fetch
    monkeypatch.setattr(range_reader, "WINDOW", 1 << 12)
    monkeypatch.setattr(
        object_store.ObjectStore,
        "fetch",
        lambda self, names, folder: (fetched.extend(names), fetch(self, names, folder)),
    )
    dora_convert.merge(base, pair[1], tmp_path / "out")
    assert weights(contents(tmp_path / "out")) == weights(contents(pair[2]))
    assert not [name for name in fetched if name.endswith(".safetensors")]


def test_entry_comes_last(pair, store, monkeypatch):
    """Until the end no loader finds the index, the config or the receipt; the mark of an unfinished output goes."""
    order = []
    put = object_store.ObjectStore.put
    monkeypatch.setattr(
        object_store.ObjectStore, "put", lambda self, name, path: (order.append(name), put(self, name, path))[1]
    )
    dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out")
    entries = [number for number, name in enumerate(order) if name.endswith(store_streaming.ENTRIES)]
    assert order[0] == "dora_convert/uploads.jsonl"
    assert entries == list(range(len(order) - len(entries), len(order)))
    assert "dora_convert/uploads.jsonl" not in stored(store, "out")


def test_resume_by_what_is_there(pair, store, monkeypatch):
    """After a failure the uploaded shards are not sent again; a shard that is gone is."""
    put, sent = object_store.ObjectStore.put, []
    monkeypatch.setattr(object_store.ObjectStore, "put", fails_at(2, sent))
    with pytest.raises(OutputError, match="no network"):
        dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out", workers=1)
    first = [name for name in sent if name.endswith("of-00002.safetensors")]
    monkeypatch.setattr(
        object_store.ObjectStore, "put", lambda self, name, path: (sent.append(name), put(self, name, path))[1]
    )
    sent.clear()
    report = dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out", workers=1)
    assert report.resumed
    assert first[0] not in sent
    assert weights(stored(store, "out")) == weights(contents(pair[2]))


def test_a_lost_shard_begins_anew(pair, store, monkeypatch):
    """The hollow copy here is not taken for the shard."""
    put = object_store.ObjectStore.put
    monkeypatch.setattr(object_store.ObjectStore, "put", fails_at(2))
    with pytest.raises(OutputError, match="no network"):
        dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out", workers=1)
    monkeypatch.setattr(object_store.ObjectStore, "put", put)
    for path in store.find("/bucket/out"):
        store.rm_file(path)
    dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out")
    assert weights(stored(store, "out")) == weights(contents(pair[2]))


def test_another_adapter_begins_anew(pair, store, tmp_path, monkeypatch):
    """Shards of an unfinished run with other inputs are not taken for this run's, but replaced."""
    put, own = object_store.ObjectStore.put, tmp_path / "own"
    shutil.copytree(pair[1], own)
    monkeypatch.setattr(object_store.ObjectStore, "put", fails_at(2))
    with pytest.raises(OutputError, match="no network"):
        dora_convert.merge(pair[0], own, f"{BUCKET}/out", workers=1)
    monkeypatch.setattr(object_store.ObjectStore, "put", put)
    tensors = load_file(own / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, own / "adapter_model.safetensors")
    with pytest.raises(OutputError, match="unfinished run of something else"):
        dora_convert.merge(pair[0], own, f"{BUCKET}/out")
    dora_convert.merge(pair[0], own, f"{BUCKET}/out", overwrite=True)
    dora_convert.merge(pair[0], own, tmp_path / "here")
    assert weights(stored(store, "out")) == weights(contents(tmp_path / "here"))


@pytest.mark.parametrize("account", [None, b'{"model-00001'])
def test_a_lost_account_begins_anew(pair, store, monkeypatch, tmp_path, account):
    """Without a valid list of what was sent, hollow shards are not taken for shards."""
    put = object_store.ObjectStore.put
    monkeypatch.setattr(object_store.ObjectStore, "put", fails_at(2))
    with pytest.raises(OutputError, match="no network"):
        dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out", workers=1)
    (path,) = (tmp_path / "home").rglob("uploads.jsonl")
    path.unlink() if account is None else path.write_bytes(account)
    for name in store.find("/bucket/out"):
        store.rm_file(name)
    monkeypatch.setattr(object_store.ObjectStore, "put", put)
    dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out")
    assert weights(stored(store, "out")) == weights(contents(pair[2]))


def test_a_shard_that_another_run_replaces(pair, store, monkeypatch):
    """The run ends before the entry of the model is written, and the same command begins anew."""
    settle = store_streaming.HubStreaming.settle

    def replaced(self):
        settle(self)
        shard = next(path for path in store.find("/bucket/out") if path.endswith(".safetensors"))
        store.pipe_file(shard, b"another")

    monkeypatch.setattr(store_streaming.HubStreaming, "settle", replaced)
    with pytest.raises(OutputError, match="changed after it was uploaded"):
        dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out")
    monkeypatch.setattr(store_streaming.HubStreaming, "settle", settle)
    assert "config.json" not in stored(store, "out")
    dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out")
    assert weights(stored(store, "out")) == weights(contents(pair[2]))


def test_what_exists_is_not_replaced(pair, store):
    """Files of others never, outputs of ours with --overwrite; stale files go."""
    store.pipe_file("/bucket/out/notes.txt", b"mine")
    with pytest.raises(OutputError, match="was not written by dora-convert"):
        dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out", overwrite=True)
    store.rm_file("/bucket/out/notes.txt")
    dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out", max_shard_size="100KB")
    with pytest.raises(OutputError, match="exists"):
        dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out")
    dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out", overwrite=True)
    assert weights(stored(store, "out")) == weights(contents(pair[2]))


def test_a_base_that_changes(pair, store, tmp_path, monkeypatch):
    """The run ends with an error, and OUT does not exist."""
    base = upload(store, pair[0], "base")
    settle = store_streaming.HubStreaming.settle

    def changes(self):
        store.pipe_file("/bucket/base/config.json", b"{} ")
        settle(self)

    monkeypatch.setattr(store_streaming.HubStreaming, "settle", changes)
    with pytest.raises(RefError, match="changed while it was read"):
        dora_convert.merge(base, pair[1], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_clear_errors(pair, store, tmp_path, monkeypatch):
    """What is missing, and what a store refuses."""
    with pytest.raises(RefError, match=r"holds no files|does not exist"):
        dora_convert.merge(f"{BUCKET}/nothing", pair[1], tmp_path / "out")
    with pytest.raises(OutputError, match="only merge writes to an object store"):
        dora_convert.convert(pair[1], f"{BUCKET}/out", to="kohya")
    for out in ("hf://org/out", "https://huggingface.co/org/out", Path("hf://org/out")):
        with pytest.raises(OutputError, match="is an address, not a folder") as caught:
            dora_convert.merge(pair[0], pair[1], out)
        assert "ORG/NAME" in caught.value.hint
    with pytest.raises(UsageError, match="goes neither with"):
        dora_convert.merge(pair[0], pair[1], f"{BUCKET}/out", verify_outputs=True)
    monkeypatch.setattr(settings, "_is_installed", lambda name: name != "s3fs")
    with pytest.raises(UsageError, match="needs s3fs") as caught:
        dora_convert.merge("s3://bucket/base", pair[1], tmp_path / "out")
    assert caught.value.hint == "pip install 'dora-convert[s3]'"
    base = upload(store, pair[0], "base")
    for error, words in (
        (PermissionError("Forbidden"), "access to bucket"),
        (OSError("no route"), "OSError: no route"),
    ):
        monkeypatch.setattr(type(store), "find", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(RefError, match=words):
            dora_convert.merge(base, pair[1], tmp_path / "out")


def test_inspect(pair, store, monkeypatch):
    """Reports are those of local folders, and no weights of a model are downloaded."""
    base, adapter, merged = pair
    fetch, fetched = object_store.ObjectStore.fetch, []
    monkeypatch.setattr(
        object_store.ObjectStore,
        "fetch",
        lambda self, names, folder: fetched.extend(names) or fetch(self, names, folder),
    )
    for folder, name in ((base, "base"), (merged, "merged"), (adapter, "adapter")):
        here = dora_convert.inspect(folder).to_dict()
        there = dora_convert.inspect(upload(store, folder, name)).to_dict()
        assert {key for key in here if here[key] != there[key]} <= {
            "ref",
            "commit",
            "seconds",
            "loaders",
        }  # which name the REF
        assert any(file.endswith(".safetensors") for file in fetched) == (name == "adapter")
    report = dora_convert.inspect(f"{BUCKET}/adapter", f"{BUCKET}/base").to_dict()
    assert report["landing"] is not None
    with pytest.raises(RefError, match="holds no files"):
        dora_convert.inspect(f"{BUCKET}/nothing")


@pytest.fixture(params=["s3", "gs", "az"])
def bucket(request, monkeypatch, tmp_path):
    """A bucket of an emulator, which the environment names."""
    if reason := missing(request.param):
        pytest.skip(reason)
    with emulated(request.param) as bucket:
        for name, value in bucket.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
        yield bucket


def test_an_emulated_store(pair, bucket, tmp_path):
    """Merge, verify, unmerge and inspect with everything in the store; a bucket that does not exist."""
    base, adapter = bucket.upload(pair[0], "base"), bucket.upload(pair[1], "adapter")
    dora_convert.merge(base, adapter, f"{bucket.url}/out")
    files = {name: bucket.read(f"out/{name}") for name in bucket.files("out")}
    assert files.keys() == contents(pair[2]).keys()
    assert weights(files) == weights(contents(pair[2]))
    assert dora_convert.verify(base, adapter, f"{bucket.url}/out").verdict == "agree"
    dora_convert.unmerge(f"{bucket.url}/out", adapter, tmp_path / "back")
    assert contents(tmp_path / "back").keys() == contents(pair[0]).keys()
    assert dora_convert.inspect(base).to_dict()["kind"] == "checkpoint"
    with pytest.raises(OutputError, match="exists"):
        dora_convert.merge(base, adapter, f"{bucket.url}/out")
    with pytest.raises(RefError, match="does not exist"):
        dora_convert.merge(f"{bucket.scheme}://no-such-bucket/base", adapter, tmp_path / "never")
