"""What a merge leaves behind so that it can be audited and undone: `OUT/dora_convert/receipt.json`.

A function of the inputs: no dates, no paths, no name of the output, so that two runs leave the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from .. import __version__
from ..plan.item import Item
from ..plan.plan import Plan
from ..plan.sharding import converted
from ..storage.refs import Source
from .finished import TensorResult, copied_name, kept_name
from .side_files import SideFile

SCHEMA = 1


def receipt_bytes(
    plan: Plan,
    done: Mapping[str, TensorResult],
    hashes: Sequence[Mapping[str, str]],
    files: Sequence[SideFile],
    base_files: Mapping[str, str],
    computed: Mapping[str, str],
    torch_version: str,
) -> bytes:
    """The receipt of a finished merge.

    `computed` names the device and the compute dtype; `hashes` holds for each adapter the xxh3-128 of its files, `files` what lies beside the weights, and
    `base_files` the sha256 of all that lay beside the base's.
    """
    options = plan.options
    receipt: dict[str, Any] = {
        "schema": SCHEMA,
        "verb": "merge",
        "versions": {"dora_convert": __version__, "torch": torch_version.partition("+")[0]},
        "base": {**_source(plan.base.source), "hash": _base_hash(plan, done)},
        "adapters": [
            {
                **_source(adapter.source),
                "format": adapter.format,
                "kind": adapter.kind,
                "weight": weight,
                "files": files,
            }
            for adapter, weight, files in zip(plan.adapters, plan.weights, hashes, strict=True)
        ],
        "options": {
            **computed,
            "dtype": options.dtype,
            "undo": options.undo,
            "include": list(options.include),
            "exclude": list(options.exclude),
            "ignore_field": list(options.ignore_field),
        },
        "tensors": {item.name: _tensor(item, done) for item in plan.items if item.noted},
        **_copied(plan, done),
        "kept": {tensor.name: _kept(done[kept_name(tensor)]) for tensor in plan.lost},
        "layout": _layout(plan),
        "side_files": {file.name: file.fate for file in files},
        "base_files": base_files,
        "ledger": [entry.to_dict() for entry in plan.ledger],
    }
    return (json.dumps(receipt, indent=1, ensure_ascii=False) + "\n").encode()


def _base_hash(plan: Plan, done: Mapping[str, TensorResult]) -> str:
    """What identifies the base as far as it was read: xxh3-128 over all headers and the contents that changed."""
    lines = [
        [tensor.name, tensor.dtype, tensor.shape, done[name].base_hash if name in done else None]
        for name, tensor in sorted(plan.base.tensors.items())
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(lines).encode())


def _source(source: Source) -> dict[str, str | None]:
    return {"name": source.name, "repo": source.repo, "commit": source.commit}


def _tensor(item: Item, done: Mapping[str, TensorResult]) -> dict[str, Any]:
    """Hashes are xxh3-128 of the tensor's bytes, before and after; what is copied has none."""
    noted: dict[str, Any] = {"fate": item.fate}
    if item.origin != item.name:
        noted["of"] = item.origin
    if made := done.get(item.name):
        undo = [part.name for part in made.parts]
        noted |= {"base": made.base_hash, "written": made.written_hash, "undo": undo}
        if made.proof:
            noted["base_sha256"] = made.proof
    return noted


def _copied(plan: Plan, done: Mapping[str, TensorResult]) -> dict[str, Any]:
    """The xxh3-128 of tensors that were copied, where a run has noted them."""
    noted = {item.name: copied_name(item) for item in plan.items if copied_name(item) in done}
    return {"copied": {name: done[key].base_hash for name, key in noted.items()}} if noted else {}


def _kept(done: TensorResult) -> dict[str, Any]:
    """Hashes of a tensor that the undo record holds whole."""
    return {"base": done.base_hash} | ({"base_sha256": done.proof} if done.proof else {})


def _layout(plan: Plan) -> dict[str, Any]:
    """The base's files and headers, as far as the output's differ: file by file its metadata and tensors."""
    base = plan.base
    mine = {shard.filename: shard for shard in plan.shards}
    shared = len({(tensor.path, tensor.start) for tensor in base.tensors.values()}) < len(base.tensors)
    layout: dict[str, Any] = {"index": base.index_name and converted(base.index_name), "shards": []}
    for shard in base.shards:
        name, noted = converted(shard.filename), [[t.name, t.dtype, list(t.shape)] for t in shard.tensors]
        same = mine.get(name)
        if same and noted == [[item.name, item.dtype, list(item.shape)] for item in same.items]:
            layout["shards"].append({"name": name})
        else:
            layout["shards"].append({"name": name, "metadata": dict(shard.metadata), "tensors": noted})
    if shared:  # as in files that torch.save wrote: names for the same bytes
        layout["starts"] = {tensor.name: tensor.start for tensor in base.tensors.values()}
    if base.is_file and base.config:
        layout["file"], layout["config"] = True, base.config
    return layout
