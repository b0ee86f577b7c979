"""The record that a merge has left beside its output, read back: the receipt, and the tensors of the undo record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import Fault, MalformedError, RefError, UsageError, shown
from ..plan.options import Options
from ..plan.sharding import converted
from ..storage.checkpoint import RECEIPT, RECORD, Checkpoint, Shard
from ..storage.json_files import read_json
from ..storage.refs import Source
from ..storage.safetensors import BITS, StoredTensor, read_header
from ..storage.schema import misfit
from ..storage.spool import NAME as UNDO
from .receipt_form import FORM


@dataclass(frozen=True)
class Record:
    """What is known of a merge: `receipt` as JSON has it, and the undo record's tensors by name."""

    receipt: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    torn: bool = False
    """Whether the undo record's tensors should be there, and are not."""

    def find(self, kind: str, name: str, dtype: str, shape: Sequence[int | None]) -> StoredTensor | None:
        """One tensor of the undo record; where a dimension is None, any will do.

        Raises MalformedError where it is another than it should be.
        """
        if not (found := self.tensors.get(f"{kind}/{name}")):
            return None
        alike = len(found.shape) == len(shape) and all(
            wanted in (None, size) for size, wanted in zip(found.shape, shape, strict=True)
        )
        if found.dtype != dtype or not alike:
            raise MalformedError(
                f"{found.path}: {found.name} is {found.dtype} {list(found.shape)}, which no merge has left.",
                hint="the undo record is damaged",
            )
        return found

    @property
    def options(self) -> Options:
        """The options of the merge, as far as they decide what was done to which tensor."""
        found = self.receipt["options"]
        include, exclude, ignored = (tuple(found[name]) for name in ("include", "exclude", "ignore_field"))
        compute = "F32" if found["compute_dtype"] == "float32" else "F64"
        known = not self.assumed
        return Options(found["dtype"], compute, None, found["undo"], include, exclude, known, ignored)

    @property
    def assumed(self) -> bool:
        """Whether nothing is known: no merge has left a record."""
        return bool(self.receipt.get("assumed"))

    @property
    def weights(self) -> tuple[float, ...]:
        """The adapters' weights."""
        return tuple(adapter["weight"] for adapter in self.receipt["adapters"])

    def file(self, name: str) -> bytes | None:
        """A file of the base's that the output does not have as it was."""
        if not (stored := self.find("file", name, "U8", [None])):
            return None
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            return file.read(stored.nbytes)


def read_record(merged: Checkpoint) -> Record | None:
    """The record of the merge that made a checkpoint; None where there is none.

    Raises MalformedError where it breaks its own format.
    """
    folder = merged.root / RECORD
    if not (folder / RECEIPT).is_file():
        return None
    receipt = read_json(folder / RECEIPT)
    if where := misfit(receipt, FORM):
        raise MalformedError(
            f"{folder / RECEIPT} has no such {shown(where)}: an older version or another tool made it, or it is damaged.",
            hint="merge again with this version, or name the base with --base",
        )
    if not (folder / UNDO).is_file():
        return Record(receipt, torn=receipt["options"]["undo"] != "none")
    return Record(receipt, read_header(folder / UNDO).tensors)


def no_record(merged: Checkpoint, adapters: int, ignore_field: Sequence[str], files: Sequence[str]) -> Record:
    """What must be assumed where a merge left no record: weights of 1, and a base with the same headers and files."""
    shards = [
        {
            "name": converted(shard.filename),
            "metadata": dict(shard.metadata),
            "tensors": [[tensor.name, tensor.dtype, tensor.shape] for tensor in shard.tensors],
        }
        for shard in merged.shards
    ]
    layout = {"index": merged.index_name and converted(merged.index_name), "shards": shards}
    options: dict[str, Any] = {"dtype": None, "compute_dtype": "float64", "undo": "none"}
    options |= {"include": [], "exclude": [], "ignore_field": list(ignore_field)}
    receipt = {
        "assumed": True,
        "versions": {},
        "base": {"name": merged.source.name, "repo": None, "commit": None},
        "adapters": [{"weight": 1.0}] * adapters,
        "options": options,
        "tensors": {},
        "kept": {},
        "layout": {**layout, "file": merged.is_file, "config": merged.config},
        "side_files": dict.fromkeys(files, "copied"),
        "base_files": dict.fromkeys(files),
        "ledger": [],
    }
    return Record(receipt)


def rebuilt(record: Record, merged: Checkpoint) -> Checkpoint:
    """The base as its headers were: names, dtypes, shapes and files, and no bytes behind them.

    Raises MalformedError where the record does not say.
    """
    layout, shards = record.receipt["layout"], []
    there = {shard.filename: shard for shard in merged.shards}
    try:
        for noted in layout["shards"]:
            name = noted["name"]
            if "tensors" in noted:
                rows, metadata = noted["tensors"], noted["metadata"]
            else:
                rows = [[tensor.name, tensor.dtype, tensor.shape] for tensor in there[name].tensors]
                metadata = there[name].metadata
            shards.append(_shard(name, rows, metadata, layout.get("starts", {}), merged))
        known = {name: record.receipt["base"][name] for name in ("name", "repo", "commit")}
        config = _config(record, merged)
        return Checkpoint(Source(merged.root, **known), tuple(shards), layout["index"], config)
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedError(
            f"{merged.root / RECORD / RECEIPT} does not say how the base was: {error!r}."
        ) from error


def _shard(
    name: str, rows: Sequence[Any], metadata: Mapping[str, str], starts: Mapping[str, int], merged: Checkpoint
) -> Shard:
    path, position, tensors = merged.root / f"{name} of the base", 0, []
    for tensor, dtype, shape in rows:
        stored = StoredTensor(tensor, dtype, tuple(shape), path, starts.get(tensor, position))
        position += stored.numel * BITS[dtype] // 8
        tensors.append(stored)
    return Shard(name, metadata, tuple(tensors))


def _config(record: Record, merged: Checkpoint) -> Any:
    """The base's config.json, wherever it is now."""
    layout = record.receipt["layout"]
    if layout.get("file"):
        return layout.get("config")
    if data := record.file("config.json"):
        return json.loads(data.decode("utf-8-sig"))
    return merged.config if "config.json" in record.receipt["base_files"] else None


def not_as_written(merged: Checkpoint, faults: Sequence[Fault]) -> RefError:
    """MERGED was changed after it was merged."""
    return RefError(
        f"MERGED {merged.source.name} is not what was written: {len(faults)} differences.",
        faults=faults,
        hint="what was trained or edited after a merge cannot be told from it",
    )


def in_order(
    record: Record, adapters: Sequence[Adapter], hashes: Sequence[Mapping[str, str]]
) -> tuple[list[Adapter], list[int]]:
    """The adapters in the order of the merge, and which of its adapters they are.

    Raises RefError, naming the files that differ, where one is not an adapter that was merged.
    """
    wanted = [dict(adapter["files"]) for adapter in record.receipt["adapters"]]
    places: list[int] = []
    for adapter, found in zip(adapters, hashes, strict=True):
        free = [place for place, files in enumerate(wanted) if files == dict(found) and place not in places]
        if not free:
            raise _not_merged(adapter, found, record)
        places.append(free[0])
    order = sorted(range(len(places)), key=places.__getitem__)
    return [adapters[number] for number in order], sorted(places)


def _not_merged(adapter: Adapter, found: Mapping[str, str], record: Record) -> Exception:
    merged = record.receipt["adapters"]
    if any(dict(other["files"]) == dict(found) for other in merged):
        return UsageError(f"ADAPTER {adapter.source.name} is given more often than it was merged.")
    nearest: Mapping[str, Any] = max(
        merged, key=lambda other: len(set(other["files"].items()) & set(found.items())), default={"files": {}}
    )
    names = sorted({*found, *nearest["files"]})
    faults = [
        Fault(name, "is another file than was merged" if name in found else "is missing")
        for name in names
        if found.get(name) != nearest["files"].get(name)
    ]
    return RefError(
        f"ADAPTER {adapter.source.name} is not the one that was merged"
        f" ({', '.join(str(other['name']) for other in merged)}).",
        faults=faults,
        hint="name the very adapter that was merged, unchanged",
    )
