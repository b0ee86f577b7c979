"""What a merge leaves behind so that it can be audited and undone: `OUT/dora_convert/receipt.json`.

A function of the inputs: no dates, no paths, no name of the output, so that two runs leave the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from . import __version__
from .execute import Done
from .items import Item
from .plan import Plan
from .precision import Choice
from .refs import Source
from .sidefiles import SideFile

SCHEMA = 1


def receipt_bytes(
    plan: Plan,
    done: Mapping[str, Done],
    hashes: Sequence[Mapping[str, str]],
    files: Sequence[SideFile],
    choice: Choice,
) -> bytes:
    """The receipt of a finished merge.

    `hashes` holds for each adapter the xxh3-128 of its files, `files` what lies beside the weights.
    """
    import torch

    options = plan.options
    receipt: dict[str, Any] = {
        "schema": SCHEMA,
        "verb": "merge",
        "versions": {"dora_convert": __version__, "torch": torch.__version__.partition("+")[0]},
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
            "device": choice.device.type,
            "compute_dtype": choice.compute_name,
            "dtype": options.dtype,
            "undo": options.undo,
            "include": list(options.include),
            "exclude": list(options.exclude),
            "ignore_field": list(options.ignore_field),
        },
        "tensors": {item.name: _tensor(item, done) for item in plan.items if _noted(item)},
        "side_files": {file.name: file.fate for file in files},
        "ledger": [entry.to_dict() for entry in plan.ledger],
    }
    return (json.dumps(receipt, indent=1, ensure_ascii=False) + "\n").encode()


def _base_hash(plan: Plan, done: Mapping[str, Done]) -> str:
    """What identifies the base as far as it was read: xxh3-128 over all headers and the contents that changed."""
    lines = [
        [tensor.name, tensor.dtype, tensor.shape, done[name].base_hash if name in done else None]
        for name, tensor in sorted(plan.base.tensors.items())
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(lines).encode())


def _source(source: Source) -> dict[str, str | None]:
    return {"name": source.name, "repo": source.repo, "commit": source.commit}


def _noted(item: Item) -> bool:
    """Whether the base does not have the tensor as it is, under the same name."""
    return item.changed or item.added or item.origin != item.name


def _tensor(item: Item, done: Mapping[str, Done]) -> dict[str, Any]:
    """Hashes are xxh3-128 of the tensor's bytes, before and after; what is copied has none."""
    noted: dict[str, Any] = {"fate": item.fate}
    if item.origin != item.name:
        noted["of"] = item.origin
    if made := done.get(item.name):
        undo = [part.name for part in made.parts]
        noted |= {"base": made.base_hash, "written": made.written_hash, "undo": undo}
    return noted
