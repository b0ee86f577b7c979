"""One LoRA taken out of a merge of several: a merged checkpoint of the others, and the record that is left of it.

Only what adds can be taken out by itself: W' − w·sBA is what the others made, up to rounding. What rounding had lost of the
base is predicted from all adapters together, so an exact record does not outlive this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import UsageError
from ..output.side_files import SideFile, base_files
from ..plan.options import Options
from ..storage.checkpoint import RECEIPT, RECORD, Checkpoint, list_files
from ..storage.spool import NAME as UNDO
from ..storage.spool import gathered
from .record import Record, no_record, rebuilt
from .unmerge_plan import Known, UnmergePlan, plan_unmerge

GONE = ("ulps/", "norm/", "start/")
"""Parts of an undo record that speak of all adapters together."""


def plan_removal(
    merged: Checkpoint, record: Record, adapters: Sequence[Adapter], places: Sequence[int], options: Options
) -> UnmergePlan:
    """Decide every tensor of the merge without some of its adapters, which are those in these places.

    Raises UsageError where one of the merge's adapters is not a LoRA, UnsupportedError where one replaces something.
    """
    all_of = record.receipt["adapters"]
    missing = [str(adapter["name"]) for place, adapter in enumerate(all_of) if place not in places]
    if not all(adapter["kind"] == "LoRA" for adapter in all_of):
        raise UsageError(
            f"{merged.source.name} was merged with {', '.join(missing)}, too, and not all of them are LoRAs.",
            hint="name all adapters",
        )
    found = record.options
    assumed = dict(no_record(merged, 0, found.ignore_field, list(base_files(merged))).receipt)
    assumed["adapters"] = [all_of[place] for place in places]
    assumed["options"] |= {"include": found.include, "exclude": found.exclude}
    assumed["tensors"] = tensors = record.receipt["tensors"]
    reversal = plan_unmerge(merged, Record(assumed), adapters, options)
    undone = [item.name for item in reversal.plan.items if item.undo]
    known = {name: Known(written=tensors.get(name, {}).get("written")) for name in undone}
    return replace(reversal, known=known, places=tuple(places))


def remaining_files(merged: Checkpoint) -> list[SideFile]:
    """What lies beside the weights, but for the card and the record, which told of the removed adapter, too."""
    names = [name for name in base_files(merged) if name != "README.md"]
    before = [name for name in list_files(merged.root) if name.startswith(f"{RECORD}/previous/")]
    return [SideFile(name, merged.root / name) for name in [*names, *before]]


def following(reversal: UnmergePlan, record: Record, done: Mapping[str, Any]) -> list[SideFile]:
    """The record of the merge that is left: without the removed adapters, and without what only all of them could use."""
    receipt = json.loads(json.dumps(record.receipt))
    receipt["adapters"] = [
        each for place, each in enumerate(receipt["adapters"]) if place not in reversal.places
    ]
    if receipt["options"]["undo"] == "exact":
        receipt["options"]["undo"] = "norms"
    for entry in reversal.plan.ledger:
        receipt["ledger"].remove(entry.to_dict())
    touched = {name for entry in receipt["ledger"] for name in entry["into"]}
    base = rebuilt(record, reversal.plan.base)
    receipt.setdefault("rounded", {})
    for item in reversal.plan.items:
        if item.undo and (noted := receipt["tensors"].get(item.name)):
            made, origin = done[item.name], base.tensors.get(noted.get("of", item.name))
            noted["written"] = made.written_hash
            if item.name not in touched and origin and origin.dtype == item.dtype:
                del receipt["tensors"][item.name]
                receipt["rounded"][item.name] = [noted["base"], made.ambiguous]
            elif item.name not in touched:
                noted["fate"] = "converted"
    for noted in receipt["tensors"].values():
        noted.pop("base_sha256", None)
        noted["undo"] = [name for name in noted.get("undo", ()) if not name.startswith(GONE)]
    kept = [stored for name, stored in record.tensors.items() if not name.startswith(GONE)]
    files = [SideFile(f"{RECORD}/{UNDO}", gathered(kept))] if record.tensors else []
    text = json.dumps(receipt, indent=1, ensure_ascii=False) + "\n"
    return [*files, SideFile(f"{RECORD}/{RECEIPT}", text.encode())]
