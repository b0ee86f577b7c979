"""REF → headers: what a REF is, without the weights of checkpoints. Those of a Hub repo stay there.

The head of each weight file comes by a range request through huggingface_hub, 100 kB or the header's length, whichever
is more. Configs, indexes, receipts and adapters are small and go through its cache, as in `hub`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .answers import explained
from .checkpoint import (
    PICKLES,
    RECORD,
    Checkpoint,
    Shard,
    is_side_file,
    is_weight_file,
    open_checkpoint,
    weight_entry,
    weight_map,
)
from .errors import Fault, MalformedError, RefError, UnsupportedError
from .hub import fetch
from .json_files import read_config
from .refs import HubRef, Source, parse_ref
from .stored import BITS, Stored

ADAPTER = "adapter_config.json"
CONNECTIONS = 8
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, struct.error)
"""What huggingface_hub makes of headers that are none, beside its own error."""


@dataclass(frozen=True)
class Look:
    """A REF with the names of the files in it, and as a checkpoint where it is one whose weights stay on the Hub."""

    source: Source
    names: tuple[str, ...] = ()
    remote: Checkpoint | None = None

    def checkpoint(self) -> Checkpoint:
        """The headers as a checkpoint; raises what `open_checkpoint` does."""
        return self.remote or open_checkpoint(self.source)


def look(ref: str, what: str, *, token: str | None = None) -> Look:
    """Find what a REF names; adapters come whole, of a checkpoint on the Hub only headers and small files.

    Without a connection, the cache's copy is taken, as by `fetch`.
    """
    listings: list[Sequence[str]] = []

    def wanted(names: Sequence[str]) -> list[str]:
        listings.append(names)
        return [name for name in names if _is_small(name, names)]

    source = fetch(ref, what, wanted, token=token)
    parsed = parse_ref(ref, what)
    if isinstance(parsed, Path) or not listings:
        folder = source.path
        return Look(source, tuple(entry.name for entry in folder.iterdir()) if folder.is_dir() else ())
    names = tuple(listings[0])
    return Look(source, names, None if ADAPTER in names else _open_remote(parsed, what, source, names, token))


def _is_small(name: str, names: Sequence[str]) -> bool:
    """Whether a file is downloaded: an adapter's own ones, or a checkpoint's config and the receipts of merges."""
    if ADAPTER in names:
        return name.startswith("adapter_") and "/" not in name
    return name == "config.json" or (name.startswith(f"{RECORD}/") and name.endswith("receipt.json"))


def _open_remote(
    ref: HubRef, what: str, source: Source, names: Sequence[str], token: str | None
) -> Checkpoint:
    entry = _entry(ref, source, names)
    if entry.removesuffix(".index.json").endswith(PICKLES):
        return _cached_pickles(source)
    table, index = None, entry if entry.endswith(".json") else None
    with explained(ref, what):
        if index:
            table = weight_map(_small_file(ref, source, index, token))
        files = [entry] if table is None else sorted(set(table.values()))
        if missing := [Fault(name, "missing") for name in files if name not in names]:
            raise RefError(
                f"The index of {source.name} names {len(missing)} files that are not there.", faults=missing
            )
        shards = _shards(ref, source, files, table or {}, token)
    _check_index(source, shards, table or {})
    others = [name for name in names if name not in {entry, *files}]
    visible = [name for name in others if not name.startswith((".", f"{RECORD}/"))]
    sides, left = tuple(filter(is_side_file, others)), tuple(filter(is_weight_file, visible))
    return Checkpoint(source, shards, index, read_config(source.path), sides, left)


def _entry(ref: HubRef, source: Source, names: Sequence[str]) -> str:
    """The file that a loader would start from; of adapters in folders, their names."""
    try:
        return weight_entry([name for name in names if "/" not in name], source.name)
    except RefError:
        below = sorted(name.removesuffix(f"/{ADAPTER}") for name in names if name.endswith(f"/{ADAPTER}"))
        if not below:
            raise
        where = f"hf://{ref.repo}{f'@{ref.revision}' if ref.revision else ''}/{ref.subfolder}".rstrip("/")
        raise RefError(
            f"{source.name} has no {ADAPTER}, but these folders inside it do: {', '.join(below[:10])}.",
            hint=f"name one of them, such as {where}/{below[-1]}",
        ) from None


def _cached_pickles(source: Source) -> Checkpoint:
    """Torch's pickles say at many places what they hold, so they are not read from afar."""
    try:
        return open_checkpoint(source)
    except (RefError, OSError) as error:
        raise UnsupportedError(
            f"{source.name} keeps its weights as torch pickles, whose headers are not read from the Hub.",
            hint=f"hf download {source.repo}, and again",
        ) from error


def _small_file(ref: HubRef, source: Source, name: str, token: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    path = f"{ref.subfolder}/{name}" if ref.subfolder else name
    return Path(hf_hub_download(ref.repo, path, revision=source.commit, token=token))


def _shards(
    ref: HubRef, source: Source, files: Sequence[str], table: Mapping[str, str], token: str | None
) -> tuple[Shard, ...]:
    """The weight files with the tensors that count, as huggingface_hub reads their headers by range requests."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    api, prefix = HfApi(token=token), f"{ref.subfolder}/" if ref.subfolder else ""

    def shard(name: str) -> Shard:
        try:
            head = api.parse_safetensors_file_metadata(ref.repo, prefix + name, revision=source.commit)
            mine = {key: info for key, info in head.tensors.items() if table.get(key, name) == name}
            tensors = [_stored(source.path / name, key, info) for key, info in mine.items()]
            return Shard(name, dict(head.metadata or {}), tuple(sorted(tensors, key=lambda it: it.start)))
        except (SafetensorsParsingError, *_DAMAGE) as error:
            raise MalformedError(f"{source.name}: the header of {name} is damaged.") from error

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return tuple(pool.map(shard, files))


def _stored(path: Path, name: str, info: Any) -> Stored:
    """A tensor whose bytes are elsewhere: `path` is where they would be, `start` counts from the header's end."""
    start, end = info.data_offsets
    tensor = Stored(name, info.dtype, tuple(info.shape), path, start)
    counts = all(type(size) is int and size >= 0 for size in (start, *tensor.shape))
    if not counts or tensor.numel * BITS[tensor.dtype] != 8 * (end - start):
        raise ValueError(name)
    return tensor


def _check_index(source: Source, shards: Sequence[Shard], table: Mapping[str, str]) -> None:
    """Every tensor that the index names must be where it says."""
    found = {(tensor.name, shard.filename) for shard in shards for tensor in shard.tensors}
    if absent := [Fault(name, f"not in {file}") for name, file in table.items() if (name, file) not in found]:
        raise MalformedError(
            f"The index of {source.name} is wrong about {len(absent)} tensors.", faults=absent
        )
