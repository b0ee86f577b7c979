"""REF → headers: what a REF is, without the weights of checkpoints. Those of a Hub repo stay there.

The head of each weight file comes by a range request through huggingface_hub's connection, as long as the index lets
expect, and what is missing by another. Configs, indexes, receipts and adapters are small and go through its cache, as in
`hub`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Fault, MalformedError, RefError, UnsupportedError
from ..formats.detect import ANCHORS, adapters_inside, detect, is_adapter_file, refuse_adapter
from ..storage.checkpoint import Checkpoint, assemble, open_checkpoint, weight_entry, weight_map
from ..storage.filenames import PICKLES, RECORD, is_side_file, is_weight_file
from ..storage.json_files import read_config
from ..storage.refs import HubRef, Source, parse_ref
from ..storage.safetensors import MAX_HEADER, Header, parse_header, read_header
from .download import CONNECTIONS, download, fetch, wanted_of_base
from .hub_client import explained, patiently
from .session import Session

FIRST = 8192
"""Bytes to ask for of a weight file of which no index tells more."""
EMPTY, ENTRY = 128, 110
"""Bytes of a header without tensors, and of what it says of one beside its name: most are shorter."""
EMPTY_RANGE = 416


@dataclass(frozen=True)
class RefListing:
    """A REF with the names of the files in it, and as a checkpoint where it is one whose weights stay on the Hub."""

    source: Source
    names: tuple[str, ...] = ()
    remote: Checkpoint | None = None

    def checkpoint(self) -> Checkpoint:
        """Return the headers as a checkpoint; raises what `open_checkpoint` does."""
        if not self.remote:
            refuse_adapter(self.source.path, self.source.name)
        return self.remote or open_checkpoint(self.source)


def look(
    ref: str,
    what: str,
    session: Session,
    *,
    whole: bool = False,
    revision: str | None = None,
    weights: Path | None = None,
) -> RefListing:
    """Find what a REF names; adapters come whole, of a checkpoint on the Hub only headers and small files.

    Small files are the config and receipts, or with `whole` all that are no weights. `weights` is the folder that the
    repo's weights will be in when they are read, by default the visit's. Without a connection, the cache's copy is
    taken, as by `fetch`.
    """
    listings: list[Sequence[str]] = []

    def wanted(names: Sequence[str]) -> list[str]:
        listings.append(names)
        if whole and not detect(names):
            return [name for name in names if not is_weight_file(name) or name.startswith(f"{RECORD}/")]
        return [name for name in names if _is_small(name, names)]

    source = fetch(ref, what, wanted, session, revision=revision)
    parsed = parse_ref(ref, what)
    if isinstance(parsed, Path) or not listings:
        folder = source.path
        return RefListing(source, tuple(entry.name for entry in folder.iterdir()) if folder.is_dir() else ())
    names = tuple(listings[0])
    folder = weights / source.subfolder if weights else source.path
    return RefListing(
        source,
        names,
        None if detect(names) else _open_remote(parsed, what, source, names, session, folder),
    )


def _is_small(name: str, names: Sequence[str]) -> bool:
    """Whether a file is downloaded: an adapter's own ones, or a checkpoint's config and the receipts of merges."""
    if detect(names):
        return is_adapter_file(name)
    return name == "config.json" or (name.startswith(f"{RECORD}/") and name.endswith("receipt.json"))


def _open_remote(
    ref: HubRef,
    what: str,
    source: Source,
    names: Sequence[str],
    session: Session,
    folder: Path,
) -> Checkpoint:
    entry = _entry(ref, what, source, names)
    if entry.removesuffix(".index.json").endswith(PICKLES):
        return _cached_pickles(source)
    table, index = None, entry if entry.endswith(".json") else None
    with explained(ref, what):
        if index:
            table = weight_map(_small_file(source, index, session))
        files = [entry] if table is None else sorted(set(table.values()))
        if missing := [Fault(name, "missing") for name in files if name not in names]:
            raise RefError(
                f"The index of {source.name} names {len(missing)} files that do not exist.", faults=missing
            )
        headers = _headers(source, files, table or {}, session.token, folder)
    notes: list[str] = []
    shards = assemble(source.name, headers, table, notes)
    others = [name for name in names if name not in {entry, *files}]
    visible = [name for name in others if not name.startswith((".", f"{RECORD}/"))]
    sides, left = tuple(filter(is_side_file, others)), tuple(filter(is_weight_file, visible))
    return Checkpoint(source, shards, index, read_config(source.path), sides, left, tuple(notes))


def _entry(ref: HubRef, what: str, source: Source, names: Sequence[str]) -> str:
    """The file that a loader would start from; for REF, which may be either, the names of adapters in folders."""
    try:
        return weight_entry([name for name in names if "/" not in name], source.name)
    except RefError:
        below = adapters_inside(names)
        if not below or what != "REF":
            raise
        where = f"hf://{ref.repo}{f'@{ref.revision}' if ref.revision else ''}/{ref.subfolder}".rstrip("/")
        raise RefError(
            f"{source.name} has no {' or '.join(ANCHORS)}, but these folders inside it do: {', '.join(below[:10])}.",
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


def open_remote(
    ref: str,
    what: str,
    session: Session,
    *,
    whole: bool = True,
    revision: str | None = None,
    weights: Path | None = None,
) -> Checkpoint:
    """A checkpoint by its headers, where it is on the Hub; its weights come later, but for torch's pickles.

    What `whole` and `weights` mean, `look` says.
    """
    try:
        seen = look(ref, what, session, whole=whole, revision=revision, weights=weights)
    except UnsupportedError:
        return open_checkpoint(fetch(ref, what, wanted_of_base, session, revision=revision))
    return seen.checkpoint()


def _small_file(source: Source, name: str, session: Session) -> Path:
    path = f"{source.subfolder}/{name}" if source.subfolder else name
    repo, commit = str(source.repo), str(source.commit)
    return download(repo, path, commit, session.token, session.place(repo, commit))


def _headers(
    source: Source, files: Sequence[str], table: Mapping[str, str], token: str | None, folder: Path
) -> dict[str, Header]:
    """The header of each weight file, as if it were in a folder. How long one is, is guessed from the names that the index has for it."""
    prefix = f"{source.subfolder}/" if source.subfolder else ""
    guess = dict.fromkeys(files, FIRST if not table else EMPTY)
    for name, file in table.items():
        guess[file] += len(name.encode()) + ENTRY

    def header(file: str) -> Header:
        if (folder / file).is_file():
            return read_header(folder / file)
        url = (str(source.repo), prefix + file, str(source.commit))
        head, size = read_range(*url, 0, guess[file], token)
        length = 8 + int.from_bytes(head[:8], "little")
        if len(head) < min(length, size, 8 + MAX_HEADER):
            head += read_range(*url, len(head), min(length, size), token)[0]
        try:
            return parse_header(folder / file, size, io.BytesIO(head))
        except MalformedError as error:
            raise MalformedError(
                f"{source.name}: the header of {file} is damaged: {error.message}"
            ) from error

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return dict(zip(files, pool.map(header, files), strict=True))


def read_range(
    repo: str, path: str, revision: str, start: int, stop: int, token: str | None
) -> tuple[bytes, int]:
    """Bytes of a file on the Hub, as far as it has them, and how many it has in all."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    headers = {**build_hf_headers(token=token), "Range": f"bytes={start}-{stop - 1}"}
    url = hf_hub_url(repo, path, revision=revision)

    def get() -> Any:
        answer = get_session().get(url, headers=headers)
        if answer.status_code != EMPTY_RANGE:
            hf_raise_for_status(answer)
        return answer

    answer = patiently(get)
    if answer.status_code == EMPTY_RANGE:
        return b"", 0
    if found := re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range") or ""):
        return answer.content, int(found[1])
    return answer.content[start:stop], len(answer.content)  # a server that knows no ranges
