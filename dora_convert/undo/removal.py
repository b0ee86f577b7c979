"""Take one LoRA out of a merge of several: a merged checkpoint of the remaining adapters, and their record.

Only what adds can be taken out by itself: W' − w·sBA is what the remaining adapters made, up to rounding. An
exact record predicts what rounding took from all adapters together, so it does not outlive a removal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from msgspec import UNSET
from msgspec.structs import replace

from ..adapters import Adapter
from ..errors import UsageError
from ..output.finished import TensorResult
from ..output.receipt import MergedTensor, Receipt
from ..output.side_files import SideFile, base_files
from ..plan.plan import Options
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import RECEIPT, RECORD, UNDO
from ..storage.spool import gather
from .record import MergeRecord, no_record, rebuilt
from .unmerge_plan import Known, UnmergePlan, plan_unmerge

GONE = ("ulps/", "norm/", "start/")
"""Parts of an undo record that belong to all adapters together."""


def plan_removal(
    merged: Checkpoint, record: MergeRecord, adapters: Sequence[Adapter], numbers: Sequence[int], options: Options
) -> UnmergePlan:
    """Decide every tensor of the merge without some of its adapters, whose numbers in the merge are `numbers`.

    Raises UsageError if one of the merge's adapters is not a LoRA, UnsupportedError if one replaces
    something.
    """
    receipt = record.receipt
    missing = [adapter.name for number, adapter in enumerate(receipt.adapters) if number not in numbers]
    how = receipt.combination
    if not (how.is_sum or how.method == "chain"):
        raise UsageError(
            f"{merged.source.name} was merged with --method {how.method}: adapters come out together.",
            hint="name all adapters",
        )
    if not all(adapter.kind == "LoRA" for adapter in receipt.adapters):
        raise UsageError(
            f"{merged.source.name} was merged with {', '.join(missing)}, too, and not all of them are LoRAs.",
            hint="name all adapters",
        )
    chosen = receipt.options
    assumed = no_record(merged, 0, chosen.ignore_field, list(base_files(merged)))
    partial = replace(
        assumed.receipt,
        adapters=tuple(receipt.adapters[number] for number in numbers),
        options=replace(assumed.receipt.options, include=chosen.include, exclude=chosen.exclude),
        tensors=receipt.tensors,
    )
    reversal = plan_unmerge(merged, dataclasses.replace(assumed, receipt=partial), adapters, options)
    undone = [item.name for item in reversal.plan.items if item.undo]
    entries = {name: receipt.tensors.get(name) for name in undone}
    known = {name: Known(written=entry.written if entry else None) for name, entry in entries.items()}
    return dataclasses.replace(reversal, known=known, numbers=tuple(numbers))


def following(reversal: UnmergePlan, record: MergeRecord, results: Mapping[str, TensorResult]) -> list[SideFile]:
    """Return the record of the merge that remains, without what only all adapters together could use."""
    receipt = _remaining(reversal, record, results)
    kept = [stored for name, stored in record.tensors.items() if not name.startswith(GONE)]
    files = [SideFile(f"{RECORD}/{UNDO}", gather(kept))] if record.tensors else []
    return [*files, SideFile(f"{RECORD}/{RECEIPT}", receipt.to_bytes())]


def _remaining(reversal: UnmergePlan, record: MergeRecord, results: Mapping[str, TensorResult]) -> Receipt:
    """Return the receipt of the merge that remains."""
    receipt, base = record.receipt, rebuilt(record, reversal.plan.base)
    removed = list(reversal.plan.ledger)
    ledger = []
    for entry in receipt.ledger:
        if entry in removed:
            removed.remove(entry)
        else:
            ledger.append(entry)
    touched = {name for entry in ledger for name in entry.into}
    tensors, rounded = dict(receipt.tensors), dict(receipt.rounded or {})
    for item in reversal.plan.items:
        if not item.undo or not (tensor := tensors.get(item.name)):
            continue
        result, original = results[item.name], base.tensors.get(tensor.of or item.name)
        if item.name in touched:
            tensors[item.name] = replace(tensor, written=result.written_hash)
        elif original and original.dtype == item.dtype:
            del tensors[item.name]
            rounded[item.name] = (tensor.base or None, result.ambiguous)
        else:
            tensors[item.name] = replace(tensor, written=result.written_hash, fate="converted")
    undo = "norms" if receipt.options.undo == "exact" else receipt.options.undo
    return replace(
        receipt,
        adapters=tuple(adapter for number, adapter in enumerate(receipt.adapters) if number not in reversal.numbers),
        options=replace(receipt.options, undo=undo),
        tensors={name: _without_proof(entry) for name, entry in tensors.items()},
        ledger=tuple(ledger),
        rounded=rounded,
        undo_record={name: digest for name, digest in receipt.undo_record.items() if not name.startswith(GONE)},
    )


def _without_proof(entry: MergedTensor) -> MergedTensor:
    """Return a tensor's entry without what only all adapters together could use."""
    names = entry.undo if entry.undo is not UNSET else ()
    return replace(entry, base_sha256=None, undo=tuple(name for name in names if not name.startswith(GONE)))
