"""Plan an unmerge: decide for every tensor of the base which tensors of MERGED and of the record restore it.

Plans the merge again from the base's headers, which the receipt holds. Then plans each tensor of the base
from the output tensor that holds it. Reads headers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..adapters import Adapter
from ..errors import Fault, MalformedError, UnsupportedError
from ..output.receipt import MergedTensor
from ..plan.item import Edit, Item
from ..plan.plan import Options, OutputShard, Plan
from ..plan.planner import make_plan
from ..plan.sharding import converted, lay_out
from ..plan.undo_part import Undo
from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import StoredTensor
from .record import MergeRecord, not_as_written, rebuilt

OF_GGUF = "token_embd.weight"
"""A tensor that every model in GGUF files has, and no other."""
WAYS_OUT = "name the base with --base or copy the base itself; or merge again with --undo exact"


@dataclass(frozen=True)
class Known:
    """The hashes in the receipt of one tensor of the base."""

    base: str | None = None
    """xxh3-128 of the base's bytes."""
    proof: str | None = None
    """sha256 of the base's bytes."""
    written: str | None = None
    """xxh3-128 of the bytes that the merge wrote instead."""

    def are_of(self, fast: str, proof: str | None) -> bool:
        """Return True if some bytes with these hashes are the base's; the sha256 decides if it is known."""
        return proof == self.proof if self.proof else fast == self.base


@dataclass(frozen=True)
class UnmergePlan:
    """The plan that undoes a merge, and the hashes that prove the result."""

    plan: Plan
    record: MergeRecord
    known: Mapping[str, Known]
    """Hashes by name of the base's tensors, without those that no adapter touched."""
    unread: Mapping[str, StoredTensor]
    """Tensors of MERGED that the merge wrote and the unmerge does not read."""
    original: Checkpoint | None = None
    """The base itself, if the caller has it."""
    numbers: tuple[int, ...] = ()
    """The numbers of the adapters that are taken out, if some of the merge's adapters stay."""

    @property
    def untouched(self) -> Mapping[str, str]:
        """The receipt's hashes of tensors that no adapter touched."""
        return self.record.receipt.copied

    def hashes(self, name: str) -> Known:
        """Return the hashes of a tensor of the base, as far as the receipt holds them."""
        return self.known.get(name, Known())

    def copies(self) -> set[str]:
        """Return the names of copied tensors whose hashes the receipt holds."""
        return {item.name for item in self.plan.items if item.verbatim and item.source.name in self.untouched}


def plan_unmerge(
    merged: Checkpoint,
    record: MergeRecord,
    adapters: Sequence[Adapter],
    options: Options,
    original: Checkpoint | None = None,
) -> UnmergePlan:
    """Decide every tensor of the base, from all adapters of a merge in their order.

    `original` is the base itself, for tensors that no record holds. `options` are those of the unmerge:
    compute dtype and shard size. Raises RefError if MERGED has other tensors than the merge wrote,
    UnsupportedError if a tensor cannot be recovered, and every error of `make_plan`.
    """
    if missing := [name for name in record.receipt.tensors if name not in merged.tensors]:
        raise not_as_written(merged, [Fault(name, "is missing") for name in missing])
    base = original if original and record.assumed else rebuilt(record, merged)
    if OF_GGUF in base.tensors:
        raise UnsupportedError(
            f"{merged.source.name} was made from the GGUF model {base.source.name}, which no unmerge gives back.",
            hint="keep the GGUF file itself",
        )
    merge = make_plan(base, adapters, record.receipt.weights, record.options)
    _compare(merge, merged, record)
    ways = {name: _recovered(tensor, merge, merged, record, original) for name, tensor in base.tensors.items()}
    if faults := [fault for fault in ways.values() if isinstance(fault, Fault)]:
        those = "adapters" if len(merge.adapters) > 1 else "adapter"
        raise UnsupportedError(
            f"{merged.source.name} and the {those} alone cannot restore {len(faults)} tensors of the base.",
            faults=faults,
            hint=WAYS_OUT,
        )
    items = {name: item for name, item in ways.items() if isinstance(item, Item)}
    shards, index_name = _laid_out(base, items, options.max_shard_size)
    plan = replace(
        merge, base=merged, options=replace(options, undo="none"), shards=shards, index_name=index_name, config=None
    )
    known = _known(merge, record)
    read = {(item.source.path, item.source.start) for item in plan.items if item.undo}
    unread = {
        name: stored
        for name, stored in merged.tensors.items()
        if (entry := record.receipt.tensors.get(name)) and entry.written and (stored.path, stored.start) not in read
    }
    return UnmergePlan(plan, record, known, unread, original)


def _laid_out(
    base: Checkpoint, items: Mapping[str, Item], max_shard_size: int | None
) -> tuple[tuple[OutputShard, ...], str | None]:
    """Return the base's own files, or shards of at most `max_shard_size` bytes."""
    if max_shard_size is not None:
        return lay_out(base, items, max_shard_size)
    shards = tuple(
        OutputShard(converted(shard.filename), shard.metadata, tuple(items[tensor.name] for tensor in shard.tensors))
        for shard in base.shards
    )
    return shards, base.index_name and converted(base.index_name)


def _compare(merge: Plan, merged: Checkpoint, record: MergeRecord) -> None:
    """Refuse a receipt that tells of another merge than the plan, and a MERGED with other tensors."""
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
    differences = {item.name: _difference(item, merged.tensors.get(item.name)) for item in merge.items}
    if faults := [Fault(name, why) for name, why in differences.items() if why]:
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
    """Return the item that recovers one tensor of the base, or the fault that says why none can."""
    name, item = tensor.name, merge.remains.get(tensor.name)
    own = original.tensors.get(name) if original else None
    if item and item.verbatim:
        return _copy(tensor, merged.tensors[item.name])
    if whole := record.find("whole", name, tensor.dtype, tensor.shape):
        return _copy(tensor, whole)
    if not item or (item.replaced and merge.options.undo == "none"):
        return _copy(tensor, own) if own else Fault(name, "was replaced or left out, and no record holds it")
    if item.source is not item.base:
        return _replaced(item, tensor, record)
    source = replace(merged.tensors[item.name], shape=item.source.shape)
    if not item.invertible:
        return _from_bits(item, tensor, source, record, own)
    rows, columns = source.matrix
    norms = tuple(
        record.find(f"norm/{number}", name, "F32", [edit.norm_count]) if edit.divides else None
        for number, edit in enumerate(item.edits)
    )
    left = record.find("start/left", name, "F32", [rows, None])
    right = record.find("start/right", name, "F32", [left.shape[1] if left else None, columns])
    if item.start and not (left and right):
        return _copy(tensor, own) if own else Fault(name, f"no record holds what {item.start.start} took from it")
    taken = (left, right) if left and right else None
    undo = Undo(norms, taken, _kept(tensor, record), record.find("ulps", name, "U8", [None]))
    if any(edit.divides and not n for edit, n in zip(item.edits, norms, strict=True)):
        if not own:
            return Fault(name, "a merged DoRA has lost ‖W + sBA‖, and no record holds it")
        if item.combination:
            return _copy(tensor, own)
        undo = Undo(norms, original=replace(own, shape=item.source.shape))
        item = replace(item, edits=tuple(_following(edit, original) for edit in item.edits))
    return _inverse(item, tensor, source, undo)


def _following(edit: Edit, original: Checkpoint | None) -> Edit:
    """Return a bias's edit with its weight as the base has it."""
    if not edit.follows or not original:
        return edit
    source = original.tensors.get(edit.follows.origin, edit.follows.source)
    return replace(edit, follows=replace(edit.follows, source=replace(source, shape=edit.follows.source.shape)))


def _replaced(item: Item, tensor: StoredTensor, record: MergeRecord) -> Item | Fault:
    """Return the item that puts the base's rows back, where an adapter's tensor replaced them."""
    fewer = [min(pair) for pair in zip(tensor.shape[:1], item.source.shape[:1], strict=True)]
    shape = (*fewer, *item.source.shape[1:])  # the adapter's tensor may have more rows, or fewer
    undo = Undo(kept=_kept(tensor, record))
    if fewer < [*tensor.shape[:1]] and not undo.kept:
        return Fault(tensor.name, "rows of it were cut off, and no record holds them")
    return _inverse(replace(item, edits=(), rows=()), tensor, replace(item.source, shape=shape), undo)


def _from_bits(
    item: Item, tensor: StoredTensor, source: StoredTensor, record: MergeRecord, own: StoredTensor | None
) -> Item | Fault:
    """Return the item that recovers a tensor by the base's bits alone, which only an exact record holds."""
    if ulps := record.find("ulps", tensor.name, "U8", [None]):
        undo = Undo(kept=_kept(tensor, record), ulps=ulps)
        return _inverse(replace(item, edits=(), combination=None), tensor, source, undo)
    how = f"merged with --method {item.combination.method}" if item.combination else "changed beside another adapter"
    kinds = [edit.inner.title for edit in item.edits if edit.inner and edit.inner.depends]
    how = f"changed by {kinds[0]} beside another adapter or at another weight than 1" if kinds else how
    why = f"was {how}, which cannot be inverted: only --undo exact keeps what it needs"
    return _copy(tensor, own) if own else Fault(tensor.name, why)


def _inverse(item: Item, tensor: StoredTensor, source: StoredTensor, undo: Undo) -> Item:
    """Return the item that recovers a tensor of the base from the output of the merge's item."""
    named = replace(item, name=tensor.name, origin=tensor.name, base=tensor, added=False)
    return replace(named, dtype=tensor.dtype, shape=tensor.shape, source=source, undo=undo)


def _copy(tensor: StoredTensor, stored: StoredTensor) -> Item:
    """Return the item that copies a tensor of the base from stored bytes."""
    return Item(tensor.name, tensor.dtype, tensor.shape, stored, stored, origin=tensor.name)


def _kept(tensor: StoredTensor, record: MergeRecord) -> tuple[StoredTensor, StoredTensor] | None:
    values = record.find("rows", tensor.name, tensor.dtype, [None, tensor.matrix[1]])
    index = record.find("index", tensor.name, "I64", [values.shape[0] if values else None])
    return (values, index) if values and index else None


def _known(merge: Plan, record: MergeRecord) -> Mapping[str, Known]:
    """Return the hashes of the base's tensors, from the receipt's entries of the output tensors."""
    found: dict[str, Known] = {}
    mine, receipt = {id(item) for item in merge.remains.values()}, record.receipt
    for item in sorted(merge.items, key=lambda item: id(item) not in mine):
        rounded, entry = (receipt.rounded or {}).get(item.name), receipt.tensors.get(item.name)
        if rounded:
            entry = MergedTensor("rounded", base=rounded[0])
        if item.base and entry and entry.base:
            read = id(item) in mine and item.source is item.base and not item.grown  # new rows are not read
            written = entry.written if read else None
            found.setdefault(item.origin, Known(entry.base, entry.base_sha256, written))
    for name, kept in receipt.kept.items():
        found.setdefault(name, Known(kept.base, kept.base_sha256))
    return found
