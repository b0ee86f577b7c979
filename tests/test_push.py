"""push and merge --push-to-hub, against a real HTTP server on loopback that a real huggingface_hub talks to."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
from huggingface_hub import ModelCard

import dora_convert

    with pytest.raises(dora_convert.UsageError, match="needs OUT"):
        dora_convert.merge(made / "base", made / "adapter", None)


def test_layers_left_out(hub, tmp_path):
    """Where nothing stays, a base's file waits for the record to hold what an output leaves out; each comes once."""
    base = make_base(tmp_path / "base", shards=3, layers=3)
    two = Base(base.path, {name: tensor for name, tensor in base.tensors.items() if ".2." not in name})
    adapter = make_adapter(tmp_path / "adapter", two, dora=True, layer_replication=[[0, 1], [0, 1]])
    hub.repos |= {"org/base": base.path}
    words = ("org/base", adapter, tmp_path / "out", "--no-cache", "--undo", "exact", "--workers", "1")
    done = run(hub, tmp_path / "home", "merge", *words)
    assert done.returncode == 0, done.stderr
    assert [hub.seen(f"GET /org/base/resolve/.*{shard}") for shard in SHARDS] == [2, 2, 2]  # header, file
    dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(base.path)
