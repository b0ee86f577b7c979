"""Good files of every kind that is read, to be broken one at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from toy import make_adapter, make_base, stopped

import dora_convert
from dora_convert.output.in_place import InPlace
from dora_convert.undo.packing import pack

INTEGERS = {"few": 20, "many": 1, "wide": 3}
"""Files of packed integers, and how far apart those are that are not zero."""
COUNT = 3000


def make_seeds(root: Path) -> None:
    """Write all of them below a folder."""
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
    make_adapter(root / "lora", base, dora=False)
    tensors = {"a": torch.ones(3, 5), "b.weight": torch.ones(4).bfloat16(), "c": torch.tensor(2)}
    torch.save(tensors, root / "new.bin")
    torch.save(tensors, root / "old.bin", _use_new_zipfile_serialization=False)
    _pack(root)
    _merge(root / "way")
    _stop(root / "stopped")
    _stop_in_place(root / "place")


def _pack(root: Path) -> None:
    for name, apart in INTEGERS.items():
        values = torch.zeros(COUNT, dtype=torch.int32 if name == "wide" else torch.int16)
        values[::apart] = torch.arange(len(values[::apart])).to(values.dtype) % 700 - 350
        (root / f"{name}.packed").write_bytes(pack(values))


def _merge(root: Path) -> None:
    """A base, an adapter that replaces rows of it and a file, and what they merge to; and that as somebody's fine-tune."""
    root.mkdir()
    base = make_base(root / "base", layers=1)
    head = base.tensors["lm_head.weight"].clone()
    head[5:9] += 1
    saved = {"base_model.model.lm_head.weight": head}
    adapter = make_adapter(root / "adapter", base, dora=True, extra=saved, modules_to_save=["lm_head"])
    (adapter / "tokenizer_config.json").write_text("{}")
    dora_convert.merge(base.path, adapter, root / "merged", undo="exact")
    dora_convert.merge(base.path, adapter, root / "norms")
    shutil.copytree(root / "norms", root / "tuned", ignore=shutil.ignore_patterns("dora_convert"))


def _stop(root: Path) -> None:
    """A merge and its undoing in the middle."""
    root.mkdir()
    base = make_base(root / "base", layers=1)
    adapter = make_adapter(root / "adapter", base, dora=True)
    with stopped(2):
        dora_convert.merge(base.path, adapter, root / "merge", undo="exact", workers=1)
    dora_convert.merge(base.path, adapter, root / "merged", undo="exact")
    with stopped(2):
        dora_convert.unmerge(root / "merged", adapter, root / "unmerge", workers=1)


def _stop_in_place(root: Path) -> None:
    """A checkpoint that is being changed, and one that only wants some files put in their places."""
    root.mkdir()
    base = make_base(root / "model", layers=1)
    adapter = make_adapter(root / "adapter", base, dora=True)
    shutil.copytree(base.path, root / "whole")
    with stopped(2):
        dora_convert.merge(base.path, adapter, in_place=True, workers=1)
    base.path.rename(root / "changing")
    (root / "whole").rename(base.path)
    finish = InPlace.finish
    InPlace.finish = lambda self: None if not self.begun else _interrupt()
    try:
        dora_convert.merge(base.path, adapter, in_place=True)
    except KeyboardInterrupt:
        base.path.rename(root / "staged")
    finally:
        InPlace.finish = finish


def _interrupt() -> None:
    raise KeyboardInterrupt
