"""Write, read and check the receipt of a merge, `OUT/dora_convert/receipt.json`.

A receipt tells auditors and `unmerge` what a merge did. It is a function of the inputs: no dates, no paths, no name of
the output, so that two runs leave the same bytes. Nothing of it is used before all of it has the types below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import xxhash
from msgspec import UNSET, Struct, UnsetType

from ..option_table import SUM, Combination
from ..plan.item import Item
from ..plan.plan import Entry, Plan
from ..plan.sharding import converted
from ..settings import __version__
from ..storage.filenames import RECEIPT, is_inside, is_plain
from ..storage.json_files import Count, Dtype, Real, checked, indented, one_of, read_json
from ..storage.reader import xxh3
from ..storage.safetensors import CONFIG_DTYPES, is_possible
from .finished import TensorResult, copied_name, kept_name
from .side_files import SideFile


class MergedSource(Struct, frozen=True, kw_only=True):
    """A checkpoint or adapter that was merged."""

    name: str
    repo: str | None = None
    commit: str | None = None

    @property
    def title(self) -> str:
        """The repo, else the name."""
        return self.repo or self.name


class MergedBase(MergedSource, frozen=True, kw_only=True):
    """The base of a merge."""

    hash: str | UnsetType = UNSET
    """xxh3-128 over all headers, and the hashes of all contents that the merge read."""


class MergedAdapter(MergedSource, frozen=True, kw_only=True):
    """An adapter that was merged."""

    format: str | UnsetType = UNSET
    kind: str
    weight: Real
    files: dict[str, str]
    """The xxh3-128 of each file."""
    decided: dict[str, str] | UnsetType = UNSET

    def is_in(self, folder: Path) -> bool:
        """Return True if a folder holds the adapter's files with the receipt's hashes."""
        return bool(self.files) and all(
            is_plain(name) and (path := _within(folder, name)).is_file() and xxh3(path) == digest
            for name, digest in self.files.items()
        )


class RecordedOptions(Struct, frozen=True, kw_only=True):
    """The options of a merge, as far as they decide what was done to which tensor."""

    device: str | UnsetType = UNSET
    compute_dtype: str
    dtype: Annotated[str, one_of(*CONFIG_DTYPES)] | None
    undo: Annotated[str, one_of("none", "norms", "exact")]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    ignore_field: tuple[str, ...]
    ignore_file: tuple[str, ...] | UnsetType = UNSET
    quantised: Annotated[str, one_of("all", "touched", "again", "as [a-z0-9-]+")] | UnsetType = UNSET
    facts: dict[str, Any] | UnsetType = UNSET
    combination: Combination | UnsetType = UNSET


class MergedTensor(Struct, frozen=True, omit_defaults=True):
    """An output tensor that adapters had a part in; hashes are xxh3-128 of its bytes before and after."""

    fate: str
    of: str | None = None
    """The base's tensor, where that has another name."""
    base: str | UnsetType | None = UNSET
    written: str | None = None
    undo: tuple[str, ...] | UnsetType = UNSET
    """Names of tensors in the undo record."""
    base_sha256: str | None = None


class KeptTensor(Struct, frozen=True, omit_defaults=True):
    """A tensor of the base that the undo record holds whole: its hashes."""

    base: str | None = None
    base_sha256: str | None = None


class BaseShard(Struct, frozen=True, omit_defaults=True):
    """A file of the base: its name, and its header where the output's file has another one."""

    name: str
    metadata: dict[str, str] | None = None
    tensors: tuple[tuple[str, Dtype, tuple[Count, ...]], ...] | None = None

    def __post_init__(self) -> None:
        if not is_inside(self.name):
            raise ValueError("not a file inside the folder")
        if not all(is_possible(shape) for _, _, shape in self.tensors or ()):
            raise ValueError("a shape is larger than any file")


class BaseLayout(Struct, frozen=True, omit_defaults=True):
    """The files and headers of the base."""

    index: str | None
    shards: tuple[BaseShard, ...]
    starts: dict[str, Count] | None = None
    """The first byte of each tensor, where tensors share bytes."""
    file: bool = False
    """True if the base was a single file."""
    config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.index is not None and not is_plain(self.index):
            raise ValueError("the index is not a plain file name")


class Receipt(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that a merge tells of itself."""

    schema: int | UnsetType = UNSET
    verb: str | UnsetType = UNSET
    versions: dict[str, str]
    base: MergedBase
    adapters: tuple[MergedAdapter, ...]
    options: RecordedOptions
    tensors: dict[str, MergedTensor]
    copied: dict[str, str] = {}
    """The xxh3-128 of tensors that no adapter touched; older merges computed it with exact records only."""
    kept: dict[str, KeptTensor]
    undo_record: dict[str, str] = {}
    """The xxh3-128 of each tensor in undo.safetensors; older merges did not compute it."""
    layout: BaseLayout
    side_files: dict[str, str]
    base_files: dict[str, str | None]
    ledger: tuple[Entry, ...]
    rounded: dict[str, tuple[str | None, Count]] | UnsetType = UNSET
    """Tensors that an adapter was taken out of again: the base's hash, and the ambiguous elements."""

    def __post_init__(self) -> None:
        if not all(map(is_inside, [*self.side_files, *self.base_files])):
            raise ValueError("the path of a side file leads out of the folder")
        if len(self.combination.densities) not in (0, len(self.adapters)):
            raise ValueError("the densities are not one for each adapter")

    @property
    def combination(self) -> Combination:
        """The way in which the adapters were combined."""
        return self.options.combination or SUM

    @property
    def weights(self) -> tuple[float, ...]:
        """The adapters' weights."""
        return tuple(adapter.weight for adapter in self.adapters)

    @property
    def allows_unmatched(self) -> bool:
        """True if the merge left out tensors of an adapter that matched nothing."""
        return any(entry.fate == "unmatched" for entry in self.ledger)

    def is_of(self, adapters: Sequence[Path]) -> bool:
        """Return True if a merge of the adapters in these folders left the receipt."""
        pairs = zip(self.adapters, adapters, strict=False)
        same = len(self.adapters) == len(adapters) and all(merged.is_in(path) for merged, path in pairs)
        return self.verb == "merge" and same

    def to_bytes(self) -> bytes:
        """Return the receipt as it is written."""
        return indented(self, texts=("tensors", "copied", "kept", "undo_record", "ledger"))


def read_receipt(record: Path) -> Receipt | None:
    """Read the receipt in the folder of a merge's record; None if no merge left one.

    Raises MalformedError where the receipt breaks its own format.
    """
    path = record / RECEIPT
    if not path.is_file():
        return None
    hint = "another version or tool made it, or it is damaged: merge again, or name the base with --base"
    return checked(read_json(path), Receipt, f"{path} is not a valid receipt", hint)


def new_receipt(
    plan: Plan,
    results: Mapping[str, TensorResult],
    hashes: Sequence[Mapping[str, str]],
    files: Sequence[SideFile],
    base_files: Mapping[str, str],
    undo_record: Mapping[str, str],
    computed: Mapping[str, str],
) -> Receipt:
    """Return the receipt of a finished merge.

    `hashes` holds for each adapter the xxh3-128 of its files, `files` the side files, and `base_files` the
    sha256 of the base's side files. `undo_record` holds the hashes of the undo record's tensors. `computed`
    names the device, the compute dtype and torch's version.
    """
    options = plan.options
    copied = {item.name: results[key].written_hash for item in plan.items if (key := copied_name(item)) in results}
    kept = {tensor.name: results[kept_name(tensor)] for tensor in plan.lost}
    return Receipt(
        schema=1,
        verb="merge",
        versions={"dora_convert": __version__, "torch": computed["torch"].partition("+")[0]},
        base=MergedBase(**plan.base.source.facts, hash=_base_hash(plan, results)),
        adapters=_adapters(plan, hashes),
        options=RecordedOptions(
            device=computed["device"],
            compute_dtype=computed["compute_dtype"],
            ignore_file=options.ignore_file or UNSET,
            quantised=options.quantised or UNSET,
            combination=UNSET if options.combination == SUM else options.combination,
            **{name: getattr(options, name) for name in ("dtype", "undo", "include", "exclude", "ignore_field")},
            facts=msgspec.to_builtins(options.facts.given) or UNSET,
        ),
        tensors={item.name: _tensor(item, results) for item in plan.items if item.noted},
        copied=copied,
        kept={name: KeptTensor(result.base_hash, result.proof) for name, result in kept.items()},
        undo_record=dict(undo_record),
        layout=_layout(plan),
        side_files={file.name: file.fate for file in files},
        base_files=dict(base_files),
        ledger=plan.ledger,
    )


def _within(folder: Path, name: str) -> Path:
    """Return the path of an adapter's file; an adapter may be a single file."""
    return (folder.parent if folder.is_file() else folder) / name


def _adapters(plan: Plan, hashes: Sequence[Mapping[str, str]]) -> tuple[MergedAdapter, ...]:
    return tuple(
        MergedAdapter(
            **adapter.source.facts,
            format=adapter.format,
            kind=adapter.kind,
            weight=weight,
            files=dict(files),
            decided=dict(adapter.decided) or UNSET,
        )
        for adapter, weight, files in zip(plan.adapters, plan.weights, hashes, strict=True)
    )


def _base_hash(plan: Plan, results: Mapping[str, TensorResult]) -> str:
    """Return the xxh3-128 over all headers of the base and the hashes of all contents that the merge read."""
    tensors, done = sorted(plan.base.tensors.items()), results
    lines = [[t.name, t.dtype, t.shape, done[name].base_hash if name in done else None] for name, t in tensors]
    return xxhash.xxh3_128_hexdigest(json.dumps(lines).encode())


def _tensor(item: Item, results: Mapping[str, TensorResult]) -> MergedTensor:
    """Return the entry of one output tensor; a copied tensor has no hashes."""
    of = None if item.origin == item.name else item.origin
    if not (result := results.get(item.name)):
        return MergedTensor(item.fate, of)
    names = tuple(part.name for part in result.parts)
    return MergedTensor(item.fate, of, result.base_hash, result.written_hash, undo=names, base_sha256=result.proof)


def _layout(plan: Plan) -> BaseLayout:
    """Return the base's files, with the headers of those that the output has otherwise."""
    base = plan.base
    written = {
        shard.filename: tuple((item.name, item.dtype, item.shape) for item in shard.items) for shard in plan.shards
    }
    shards = []
    for shard in base.shards:
        name, rows = converted(shard.filename), tuple((t.name, t.dtype, t.shape) for t in shard.tensors)
        shards.append(BaseShard(name) if written.get(name) == rows else BaseShard(name, dict(shard.metadata), rows))
    tensors = base.tensors.values()
    shared = len({(tensor.path, tensor.start) for tensor in tensors}) < len(tensors)  # as torch.save does
    lone = base.is_file and bool(base.config)
    return BaseLayout(
        base.index_name and converted(base.index_name),
        tuple(shards),
        {tensor.name: tensor.start for tensor in tensors} if shared else None,
        lone,
        dict(base.config) if lone and base.config else None,
    )
