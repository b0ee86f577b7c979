"""Read what a REF names from its headers, and leave the weights of a remote checkpoint on the Hub.

The header of each weight file comes by one range request, whose length is estimated from the index, and by a
second one if the estimate was too short. Configs, indexes, receipts and adapters are small and are downloaded
by `download`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import MalformedError, RefError, UnsupportedError
from ..formats.detect import ANCHORS, adapters_inside, detect, is_small_of_adapter, refuse_adapter
from ..storage.checkpoint import Checkpoint, Shard, assemble, open_checkpoint, weight_entry
from ..storage.filenames import GGUF, PICKLES, RECORD, is_weight_file, sort_files
from ..storage.json_files import read_config, shard_files, weight_map
from ..storage.pipelines import INDEX as PIPELINE
from ..storage.pipelines import files_inside
from ..storage.refs import HubRef, Source, local_source
from ..storage.safetensors import MAX_HEADER, Header, parse_header, read_header
from . import Session
from .download import CONNECTIONS, download, fetch
from .hub_client import reading_errors, with_retries

FIRST = 8192
"""Bytes of the first request for a weight file without an index."""
EMPTY, ENTRY = 128, 110
"""Bytes of a header without tensors, and of most entries of a tensor beside its name."""
EMPTY_RANGE = 416
"""HTTP status for a range behind the end of a file."""


@dataclass(frozen=True)
class RefListing:
    """A REF with the names of its files, and the headers of a checkpoint whose weights stay on the Hub."""

    source: Source
    names: tuple[str, ...] = ()
    remote: Checkpoint | None = None

    def checkpoint(self) -> Checkpoint:
        """Return the headers as a checkpoint; raises the errors of `open_checkpoint`."""
        if not self.remote:
            refuse_adapter(self.source.path, self.source.name)
        return self.remote or open_checkpoint(self.source)


def look(
    ref: Path | HubRef, what: str, session: Session, *, whole: bool = False, weights: Path | None = None
) -> RefListing:
    """List a REF: download an adapter, but of a checkpoint on the Hub only headers and small files.

    Small files are the config and receipts, or with `whole` all files but the weights. `weights` is the
    folder that will hold the repo's weights once they are downloaded, by default the session's. Without a
    connection the cache's copy is taken.
    """
    listings: list[Sequence[str]] = []

    def wanted(names: Sequence[str]) -> list[str]:
        listings.append(names)
        if whole and not detect(names):
            return [name for name in names if not is_weight_file(name) or name.startswith(f"{RECORD}/")]
        return [name for name in names if _is_small(name, names)]

    source = local_source(ref) if isinstance(ref, Path) else fetch(ref, what, wanted, session)
    folder = source.path
    if isinstance(ref, Path) or not listings:
        return RefListing(source, tuple(entry.name for entry in folder.iterdir()) if folder.is_dir() else ())
    names = tuple(listings[0])
    if detect(names):
        return RefListing(source, names)
    folder = weights / source.subfolder if weights else folder
    if PIPELINE in names:
        with reading_errors(ref, what):
            return RefListing(source, names, _open_pipeline(source, names, session, folder))
    entry = _entry(ref, what, source, names)
    if entry.removesuffix(".index.json").endswith((*PICKLES, GGUF)):
        return RefListing(source, names, _cached_pickles(source))
    with reading_errors(ref, what):
        return RefListing(source, names, _open_remote(source, names, entry, session, folder))


def _is_small(name: str, names: Sequence[str]) -> bool:
    """Return True for files of an adapter, and for a checkpoint's config and receipts."""
    if detect(names):
        return is_small_of_adapter(name)
    return name == "config.json" or (name.startswith(f"{RECORD}/") and name.endswith("receipt.json"))


def _open_remote(source: Source, names: Sequence[str], entry: str, session: Session, folder: Path) -> Checkpoint:
    """Return a remote checkpoint from its headers; `entry` is its index or its only weight file."""
    table = weight_map(download(source.hub, entry, session)) if entry.endswith(".json") else None
    files = [entry] if table is None else shard_files(source.name, table, names.__contains__)
    headers = _headers(source, files, table or {}, session.token, folder)
    notes: list[str] = []
    shards = assemble(source.name, headers, table, notes)
    side_files, left_behind = sort_files(name for name in names if name not in {entry, *files})
    return Checkpoint(
        source,
        shards,
        entry if table is not None else None,
        config=read_config(source.path),
        side_files=side_files,
        left_behind=left_behind,
        notes=tuple(notes),
    )


def _open_pipeline(source: Source, names: Sequence[str], session: Session, folder: Path) -> Checkpoint:
    """Return a remote pipeline from its headers; its tensors are named `<component>/<name>`.

    Raises UnsupportedError for components that are torch's pickles.
    """
    shards, indexes, notes = list[Shard](), list[str](), list[str]()
    for component, inner in files_inside(names).items():
        where, entry = f"{source.name}/{component[:-1]}", weight_entry(inner, f"{source.name}/{component[:-1]}")
        if entry.removesuffix(".index.json").endswith(PICKLES):
            raise UnsupportedError(
                f"{where} keeps its weights as torch pickles, whose headers are not read from the Hub.",
                hint=f"hf download {source.repo}, then rerun",
            )
        is_index = entry.endswith(".json")
        table = weight_map(download(source.hub, component + entry, session)) if is_index else None
        files = [entry] if table is None else shard_files(where, table, inner.__contains__)
        places = {name: component + file for name, file in table.items()} if table else None
        headers = _headers(source, [component + file for file in files], places or {}, session.token, folder)
        for shard in assemble(where, headers, places, notes):
            tensors = tuple(replace(tensor, name=component + tensor.name) for tensor in shard.tensors)
            shards.append(replace(shard, tensors=tensors))
        indexes += [component + entry] if is_index else []
    used = {*indexes, *(shard.filename for shard in shards)}
    sides, left = sort_files(name for name in names if name not in used)
    sides = tuple(sorted((*sides, *indexes)))
    return Checkpoint(source, tuple(shards), None, side_files=sides, left_behind=left, notes=tuple(notes))


def _entry(ref: HubRef, what: str, source: Source, names: Sequence[str]) -> str:
    """Return the file that a loader starts from.

    Raises RefError if no weights are found; for REF the error names the folders with adapters.
    """
    try:
        return weight_entry([name for name in names if "/" not in name], source.name)
    except RefError:
        folders = adapters_inside(names)
        if not folders or what != "REF":
            raise
        raise RefError(
            f"{source.name} has no {' or '.join(ANCHORS)}, but these folders inside it do: {', '.join(folders[:10])}.",
            hint=f"name one of them, such as hf://{ref}/{folders[-1]}",
        ) from None


def _cached_pickles(source: Source) -> Checkpoint:
    """Return the cache's copy of a pickled checkpoint: pickles have no header that one request could read."""
    try:
        return open_checkpoint(source)
    except (RefError, OSError) as error:
        raise UnsupportedError(
            f"{source.name} keeps its weights as torch pickles or GGUF, whose headers are not read from the Hub.",
            hint=f"hf download {source.repo}, then rerun",
        ) from error


def _headers(
    source: Source, files: Sequence[str], table: Mapping[str, str], token: str | None, folder: Path
) -> dict[str, Header]:
    """Return the header of each weight file with paths as if the files were in `folder`.

    The length of a header is estimated from the names that the index has for its file.
    """
    lengths = dict.fromkeys(files, FIRST if not table else EMPTY)
    for name, file in table.items():
        lengths[file] += len(name.encode()) + ENTRY

    def header(file: str) -> Header:
        if (folder / file).is_file():
            return read_header(folder / file)
        head, size = read_range(source.hub, file, range(lengths[file]), token)
        length = 8 + int.from_bytes(head[:8], "little")
        if len(head) < min(length, size, 8 + MAX_HEADER):
            head += read_range(source.hub, file, range(len(head), min(length, size)), token)[0]
        try:
            return parse_header(folder / file, size, io.BytesIO(head))
        except MalformedError as error:
            raise MalformedError(f"{source.name}: the header of {file} is damaged: {error.message}") from error

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return dict(zip(files, pool.map(header, files), strict=True))


def read_range(ref: HubRef, name: str, span: range, token: str | None) -> tuple[bytes, int]:
    """Return the bytes of a remote file in `span`, as far as they exist, and the size of the file."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(token=token), "Range": f"bytes={span.start}-{span.stop - 1}"}
    url = hf_hub_url(ref.repo, ref.in_repo(name), revision=ref.revision)

    def get() -> Any:
        response = get_session().get(url, headers=headers)
        if response.status_code != EMPTY_RANGE:
            hf_raise_for_status(response)
        return response

    response = with_retries(get)
    if response.status_code == EMPTY_RANGE:
        return b"", 0
    if match := re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range") or ""):
        return response.content, int(match[1])
    content = response.content  # of a server without ranges: the whole file
    return content[span.start : span.stop], len(content)
