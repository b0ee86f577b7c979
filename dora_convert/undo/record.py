"""Read back the record that a merge left beside its output: the receipt, and the tensors of the undo record.

`dora_convert/undo.safetensors`, the undo record, holds for every output tensor that needs it

    norm/<n>/<tensor>    F32 (out)        ‖W + sBA‖ of the n-th edit's outputs: no DoRA merge is undone without it
    rows/<tensor>        as in the base   the base's rows that an adapter's tensor replaced, where they differ
    index/<tensor>       I64 (rows)       the numbers of those rows; a row is all dimensions but the first
    start/left/<tensor>  F32 (out, rank)  the factors that PiSSA, OLoRA or KaSA took from the base
    start/right/<tensor> F32 (rank, in)
    ulps/<tensor>        U8 (bytes)       what rounding took, packed: exact records only
    whole/<tensor>       as in the base   a tensor of the base that the output does not have
    file/<name>          U8 (bytes)       a side file of the base that was edited, replaced or left out
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..adapters import Adapter
from ..errors import Fault, MalformedError, RefError, UsageError
from ..output.receipt import BaseLayout, BaseShard, MergedAdapter, MergedBase, Receipt, RecordedOptions, read_receipt
from ..plan.plan import Options
from ..plan.sharding import converted
from ..settings import parse_facts
from ..storage.checkpoint import Checkpoint, Shard
from ..storage.filenames import RECEIPT, RECORD, UNDO
from ..storage.reader import read_whole
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor, read_header

TELLING = re.compile(r"\.weight_shape$|\.quant_state\.")
"""Tensors whose bytes tell a quantised weight's shape."""


@dataclass(frozen=True)
class MergeRecord:
    """The receipt of a merge, and the undo record's tensors by name."""

    receipt: Receipt
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    torn: bool = False
    """True if the undo record should exist and does not."""
    assumed: bool = False
    """True if no merge left a record: nothing is known."""

    def find(self, kind: str, name: str, dtype: str, shape: Sequence[int | None]) -> StoredTensor | None:
        """Return one tensor of the undo record, or None; a dimension of None matches any size.

        Raises MalformedError for a tensor of another dtype or shape.
        """
        if not (stored := self.tensors.get(f"{kind}/{name}")):
            return None
        alike = len(stored.shape) == len(shape) and all(
            wanted in (None, size) for size, wanted in zip(stored.shape, shape, strict=True)
        )
        if stored.dtype != dtype or not alike:
            raise MalformedError(
                f"{stored.path}: {stored.name} is {stored.dtype} {list(stored.shape)}; no merge leaves this.",
                hint="the undo record is damaged",
            )
        return stored

    @property
    def options(self) -> Options:
        """The options of the merge, as far as they decide what was done to which tensor."""
        options = self.receipt.options
        return Options(
            options.dtype,
            "F32" if options.compute_dtype == "float32" else "F64",
            undo=options.undo,
            include=options.include,
            exclude=options.exclude,
            allow_unmatched=not self.assumed,
            combination=self.receipt.combination,
            ignore_field=options.ignore_field,
            ignore_file=options.ignore_file or (),
            quantised=options.quantised or "",
            facts=parse_facts(options.facts or {}),
        )

    def file(self, name: str) -> bytes | None:
        """Return a side file of the base from the undo record, or None."""
        stored = self.find("file", name, "U8", [None])
        return read_whole(stored) if stored else None


def read_record(merged: Checkpoint) -> MergeRecord | None:
    """Read the record of the merge that made a checkpoint; None if the checkpoint has none.

    Raises MalformedError where the record breaks its own format.
    """
    folder = merged.root / RECORD
    if not (receipt := read_receipt(folder)):
        return None
    if not (folder / UNDO).is_file():
        return MergeRecord(receipt, torn=receipt.options.undo != "none")
    return MergeRecord(receipt, read_header(folder / UNDO).tensors)


def no_record(merged: Checkpoint, adapters: int, ignore_field: Sequence[str], files: Sequence[str]) -> MergeRecord:
    """Return what is assumed without a record: weights of 1, and a base with the same headers and files."""
    shards = tuple(
        BaseShard(
            converted(shard.filename),
            dict(shard.metadata),
            tuple((tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors),
        )
        for shard in merged.shards
    )
    config = dict(merged.config) if merged.config else None
    index = merged.index_name and converted(merged.index_name)
    receipt = Receipt(
        versions={},
        base=MergedBase(name=merged.source.name),
        adapters=(MergedAdapter(name="", kind="", weight=1.0, files={}),) * adapters,
        options=RecordedOptions(
            compute_dtype="float64", dtype=None, undo="none", include=(), exclude=(), ignore_field=tuple(ignore_field)
        ),
        tensors={},
        kept={},
        layout=BaseLayout(index, shards, file=merged.is_file, config=config),
        side_files=dict.fromkeys(files, "copied"),
        base_files=dict.fromkeys(files),
        ledger=(),
    )
    return MergeRecord(receipt, assumed=True)


def rebuilt(record: MergeRecord, merged: Checkpoint) -> Checkpoint:
    """Return the base as its headers were: names, dtypes, shapes and files, and no bytes behind them.

    Raises MalformedError where the record does not say.
    """
    layout, base = record.receipt.layout, record.receipt.base
    try:
        shards = tuple(_shard(noted, layout, record, merged) for noted in layout.shards)
        config = _config(record, merged)
    except (KeyError, ValueError) as error:
        raise MalformedError(f"{merged.root / RECORD / RECEIPT} does not say how the base was: {error!r}.") from error
    return Checkpoint(Source(merged.root, base.name, base.repo, base.commit), shards, layout.index, config)


def _shard(noted: BaseShard, layout: BaseLayout, record: MergeRecord, merged: Checkpoint) -> Shard:
    """Return a file of the base; its header is the receipt's, else that of the merged file."""
    rows, metadata = noted.tensors, noted.metadata or {}
    if rows is None:
        same = next((shard for shard in merged.shards if shard.filename == noted.name), None)
        if not same:
            raise KeyError(noted.name)
        rows = tuple((tensor.name, tensor.dtype, tensor.shape) for tensor in same.tensors)
        metadata = dict(same.metadata)
    path, position, tensors = merged.root / f"{noted.name} of the base", 0, []
    for name, dtype, shape in rows:
        tensors.append(StoredTensor(name, dtype, shape, path, (layout.starts or {}).get(name, position)))
        position += tensors[-1].nbytes
        if TELLING.search(name):
            found = record.find("whole", name, dtype, shape) or merged.tensors.get(name)
            tensors[-1] = replace(found, name=name) if found else tensors[-1]
    return Shard(noted.name, metadata, tuple(tensors))


def _config(record: MergeRecord, merged: Checkpoint) -> Any:
    """Return the base's config.json, from the receipt, the undo record or the merged folder."""
    layout = record.receipt.layout
    if layout.file:
        return layout.config
    if data := record.file("config.json"):
        return json.loads(data.decode("utf-8-sig"))
    return merged.config if "config.json" in record.receipt.base_files else None


def not_as_written(merged: Checkpoint, faults: Sequence[Fault]) -> RefError:
    """Return the error that MERGED was changed after it was merged."""
    return RefError(
        f"MERGED {merged.source.name} is not what was written: {len(faults)} differences.",
        faults=faults,
        hint="what was trained or edited after a merge cannot be told from it",
    )


def in_order(
    record: MergeRecord, adapters: Sequence[Adapter], hashes: Sequence[Mapping[str, str]]
) -> tuple[list[Adapter], list[int]]:
    """Return the adapters in the order of the merge, and their numbers in the merge.

    Raises RefError, naming the files that differ, for an adapter that was not merged.
    """
    merged, numbers = record.receipt.adapters, list[int]()
    for adapter, files in zip(adapters, hashes, strict=True):
        free = [number for number, other in enumerate(merged) if other.files == dict(files) and number not in numbers]
        if not free:
            raise _not_merged(adapter, files, merged)
        numbers.append(free[0])
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    known = [merged[number].decided or {} for number in numbers]
    return [replace(adapters[position], decided=known[position]) for position in order], sorted(numbers)


def _not_merged(adapter: Adapter, files: Mapping[str, str], merged: Sequence[MergedAdapter]) -> RefError | UsageError:
    """Return the error that an adapter was not merged, or not so often."""
    if any(other.files == dict(files) for other in merged):
        return UsageError(f"ADAPTER {adapter.source.name} is given more often than it was merged.")
    candidates = [other.files for other in merged]
    nearest = max(candidates, key=lambda each: len(each.items() & files.items()), default={})
    faults = [
        Fault(name, "is another file than was merged" if name in files else "is missing")
        for name in sorted({*files, *nearest})
        if files.get(name) != nearest.get(name)
    ]
    return RefError(
        f"ADAPTER {adapter.source.name} is not the one that was merged ({', '.join(other.name for other in merged)}).",
        faults=faults,
        hint="name the very adapter that was merged, unchanged",
    )
