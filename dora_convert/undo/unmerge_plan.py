"""From a merged checkpoint and its record to a plan that takes the adapters out again.

The plan of the merge is made once more, from the base's headers, which the receipt tells; then each of the base's
tensors is planned from the output tensor that it is in. Reads nothing but headers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..adapters.adapter import Adapter
from ..errors import Fault, MalformedError, UnsupportedError
from ..output.receipt import MergedTensor
from ..plan.item import Item, Undo
from ..plan.options import Options
from ..plan.plan import OutputShard, Plan
from ..plan.planner import make_plan
from ..plan.sharding import converted, lay_out
from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import StoredTensor
from .record import MergeRecord, not_as_written, rebuilt

WAYS_OUT = "merge again with --undo norms or exact, name the base with --base, or copy the base itself"


@dataclass(frozen=True)
class Known:
    """What the receipt says of one of the base's tensors."""

    base: str | None = None
    """xxh3-128 of its bytes."""
    proof: str | None = None
    """sha256 of them."""
    written: str | None = None
    """xxh3-128 of what a merge wrote in its place."""


@dataclass(frozen=True)
class UnmergePlan:
    """The plan that undoes a merge, and how to tell whether it did."""

    plan: Plan
    record: MergeRecord
    known: Mapping[str, Known]
    """By names of the base's tensors; those that were not touched are not in it."""
    unread: Mapping[str, StoredTensor]
    """Tensors of MERGED that a merge wrote and undoing does not read."""
    original: Checkpoint | None = None
    """The base itself, where it is at hand."""
    places: tuple[int, ...] = ()
    """Where only some of a merge's adapters are taken out: which of them."""


def plan_unmerge(
    merged: Checkpoint,
    record: MergeRecord,
    adapters: Sequence[Adapter],
    options: Options,
    original: Checkpoint | None = None,
) -> UnmergePlan:
    """Decide every tensor of the base, from all adapters of a merge in their order.

    `original` is the base itself, for what no record holds. `options` are those of the recovery: compute dtype and shard
    size. Raises RefError where MERGED has other tensors than were written, UnsupportedError where something is gone for
    good, and what `make_plan` raises.
    """
    if missing := [name for name in record.receipt.tensors if name not in merged.tensors]:
        raise not_as_written(merged, [Fault(name, "is missing") for name in missing])
    base = original if original and record.assumed else rebuilt(record, merged)
    merge = make_plan(base, adapters, record.receipt.weights, record.options)
    _compare(merge, merged, record)
    found = {
        name: _recovered(tensor, merge, merged, record, original) for name, tensor in base.tensors.items()
    }
    if faults := [fault for fault in found.values() if isinstance(fault, Fault)]:
        raise UnsupportedError(
            f"{len(faults)} tensors of the base cannot be told from {merged.source.name} and the adapter alone.",
            faults=faults,
            hint=WAYS_OUT,
        )
    items = {name: item for name, item in found.items() if isinstance(item, Item)}
    shards, index_name = _laid_out(base, items, options.max_shard_size)
    plan = Plan(
        merged,
        tuple(adapters),
        record.receipt.weights,
        replace(options, undo="none"),
        shards,
        index_name,
        merge.ledger,
    )
    known = _known(merge, record)
    read = {(item.source.path, item.source.start) for item in plan.items if item.undo}
    unread = {
        name: stored
        for name, stored in merged.tensors.items()
        if (entry := record.receipt.tensors.get(name))
        and entry.written
        and (stored.path, stored.start) not in read
    }
    return UnmergePlan(plan, record, known, unread, original)


def _laid_out(
    base: Checkpoint, items: Mapping[str, Item], max_shard_size: int | None
) -> tuple[tuple[OutputShard, ...], str | None]:
    """The base's own files, or shards of at most a size."""
    if max_shard_size is not None:
        return lay_out(base, items, max_shard_size)
    shards = tuple(
        OutputShard(
            converted(shard.filename), shard.metadata, tuple(items[tensor.name] for tensor in shard.tensors)
        )
        for shard in base.shards
    )
    return shards, base.index_name and converted(base.index_name)


def _compare(merge: Plan, merged: Checkpoint, record: MergeRecord) -> None:
    """What was planned once more must be what the receipt says was done, and MERGED must have the tensors that it made."""
    fates = {item.name: item.fate for item in merge.items if item.noted}
    receipt = record.receipt
    noted = {name: entry.fate for name, entry in receipt.tensors.items()}
    same = (fates, Counter(merge.ledger)) == (noted, Counter(receipt.ledger))
    if not record.assumed and not same:  # a removal may have left the ledger in another order
        version = receipt.versions.get("dora_convert")
        raise MalformedError(
            f"The receipt of {merged.source.name} tells of another merge than this version would make of it.",
            hint=f"dora-convert {version} made it and can undo it",
        )
    faults = [
        Fault(item.name, _difference(item, merged.tensors.get(item.name)))
        for item in merge.items
        if _difference(item, merged.tensors.get(item.name))
    ]
    if faults:
        raise not_as_written(merged, faults)


def _difference(item: Item, stored: StoredTensor | None) -> str:
    if not stored:
        return "is missing"
    if (stored.dtype, stored.shape) != (item.dtype, item.shape):
        return f"is {stored.dtype} {list(stored.shape)}; {item.dtype} {list(item.shape)} was written"
    return ""


def _recovered(
    tensor: StoredTensor, merge: Plan, merged: Checkpoint, record: MergeRecord, original: Checkpoint | None
) -> Item | Fault:
    """How one of the base's tensors comes back, or why it cannot."""
    name, item = tensor.name, merge.remains.get(tensor.name)
    own = original and original.tensors.get(name)
    if item and item.verbatim:
        return _copy(tensor, merged.tensors[item.name])
    if whole := record.find("whole", name, tensor.dtype, tensor.shape):
        return _copy(tensor, whole)
    if not item or (item.replaced and merge.options.undo == "none"):
        return _copy(tensor, own) if own else Fault(name, "was replaced or left out, and no record holds it")
    if item.source is not item.base:
        fewer = [min(pair) for pair in zip(tensor.shape[:1], item.source.shape[:1], strict=True)]
        shape = (*fewer, *item.source.shape[1:])  # the adapter's may have more rows, or fewer
        undo = Undo(kept=_kept(tensor, record))
        if fewer < [*tensor.shape[:1]] and not undo.kept:
            return Fault(name, "rows of it were cut off, and no record holds them")
        return _inverse(replace(item, edits=(), rows=()), tensor, replace(item.source, shape=shape), undo)
    source = replace(merged.tensors[item.name], shape=item.source.shape)
    rows, columns = source.matrix
    norms = tuple(
        record.find(f"norm/{number}", name, "F32", [rows if edit.axis else columns])
        if edit.decomposed
        else None
        for number, edit in enumerate(item.edits)
    )
    left = record.find("start/left", name, "F32", [rows, None])
    right = record.find("start/right", name, "F32", [left.shape[1] if left else None, columns])
    if item.start and not (left and right):
        return (
            _copy(tensor, own)
            if own
            else Fault(name, f"no record holds what {item.start.start} took from it")
        )
    taken = (left, right) if left and right else None
    undo = Undo(norms, taken, _kept(tensor, record), record.find("ulps", name, "U8", [None]))
    if any(edit.decomposed and not n for edit, n in zip(item.edits, norms, strict=True)):
        if not own:
            return Fault(name, "a merged DoRA has lost ‖W + sBA‖, and no record holds it")
        undo = Undo(norms, original=replace(own, shape=item.source.shape))
    return _inverse(item, tensor, source, undo)


def _inverse(item: Item, tensor: StoredTensor, source: StoredTensor, undo: Undo) -> Item:
    """The item that makes a tensor of the base from what an item has made."""
    named = replace(item, name=tensor.name, origin=tensor.name, base=tensor, added=False)
    return replace(named, dtype=tensor.dtype, shape=tensor.shape, source=source, undo=undo)


def _copy(tensor: StoredTensor, stored: StoredTensor) -> Item:
    """A tensor whose bytes are somewhere as they were."""
    return Item(tensor.name, tensor.dtype, tensor.shape, stored, stored, origin=tensor.name)


def _kept(tensor: StoredTensor, record: MergeRecord) -> tuple[StoredTensor, StoredTensor] | None:
    values = record.find("rows", tensor.name, tensor.dtype, [None, tensor.matrix[1]])
    index = record.find("index", tensor.name, "I64", [values.shape[0] if values else None])
    return (values, index) if values and index else None


def _known(merge: Plan, record: MergeRecord) -> Mapping[str, Known]:
    """The hashes of the base's tensors: every output tensor that was made of one tells them."""
    found: dict[str, Known] = {}
    mine, receipt = {id(item) for item in merge.remains.values()}, record.receipt
    for item in sorted(merge.items, key=lambda item: id(item) not in mine):
        rounded, entry = (receipt.rounded or {}).get(item.name), receipt.tensors.get(item.name)
        if rounded:
            entry = MergedTensor("rounded", base=rounded[0])
        if item.base and entry and entry.base:
            read = id(item) in mine and item.source is item.base
            written = entry.written if read else None
            found.setdefault(item.origin, Known(entry.base, entry.base_sha256, written))
    for name, kept in receipt.kept.items():
        found.setdefault(name, Known(kept.base, kept.base_sha256))
    return found
