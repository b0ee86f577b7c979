"""Read and write a folder in an object store, through fsspec and the file system that an extra brings."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ..errors import OutputError, RefError
from ..formats.detect import detect, refuse_adapter, wanted_of_adapter
from ..settings import EXTRAS, require_extra
from ..storage.checkpoint import Checkpoint, assemble, open_checkpoint, weight_entry
from ..storage.filenames import PICKLES, RECEIPT, RECORD, is_weight_file, sort_files
from ..storage.json_files import read_config, shard_files, weight_map
from ..storage.refs import Source, stored_address
from ..storage.safetensors import MAX_HEADER, Header, parse_header
from . import Session
from .remote_headers import RefListing

FIRST = 1 << 16
"""Bytes of the first request for a header."""
CONNECTIONS = 8
LOG_IN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or log in with aws configure",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud auth application-default login",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING",
}
"""The ways to give each store credentials."""

NOBODY = ("Anonymous caller", "unable to connect to account")
"""The beginnings of Google's and Azure's words for it."""
TAGS = ("ETag", "md5Hash", "crc32c", "etag", "created")
"""Facts of an object that change with its bytes, the best first: S3's, two of Google's, Azure's, any other store's."""


class StoredFile(NamedTuple):
    """One object: its size, and a tag that changes with its contents."""

    size: int
    tag: str


class ObjectStore:
    """A folder in an object store."""

    def __init__(self, url: str) -> None:
        """Take the address of a folder; raise UsageError if the extra is missing, RefError without credentials."""
        check_address(url)
        self.url = stored_address(url).rstrip("/")
        self._scheme, _, self._root = self.url.partition("://")
        if self._scheme == "gs":
            _quieten_gcsfs()
        import fsspec

        with self.reading():
            self._system: Any = fsspec.filesystem(self._scheme, use_listings_cache=False, skip_instance_cache=True)
        self._root = str(self._system._strip_protocol(self.url))  # noqa: SLF001 - fsspec's name for a public step

    def path(self, name: str) -> str:
        """Return the store's own name of a file."""
        return f"{self._root}/{name}"

    def files(self) -> dict[str, StoredFile]:
        """Return all files below the folder, by their paths inside it; RefError without access."""
        with self.reading():
            found = self._system.find(self._root, detail=True)
            if not found:
                self._system.ls(self._root.partition("/")[0])  # raises for a bucket that does not exist
        return {
            path.removeprefix(f"{self._root}/"): StoredFile(int(info["size"]), _tag(info))
            for path, info in found.items()
        }

    def read(self, name: str, spans: Sequence[range]) -> list[bytes]:
        """Return ranges of one file, read at once."""
        with self.reading():
            if len(spans) == 1:
                return [self._system.cat_file(self.path(name), start=spans[0].start, end=spans[0].stop)]
            starts, stops = [span.start for span in spans], [span.stop for span in spans]
            data: list[bytes] = self._system.cat_ranges([self.path(name)] * len(spans), starts, stops)
        return data

    def fetch(self, names: Sequence[str], folder: Path) -> None:
        """Download files into a folder."""

        def get(name: str) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self._system.get_file(self.path(name), str(folder / name))

        with self.reading(), ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(get, names))

    def put(self, name: str, path: Path) -> StoredFile:
        """Upload a file, a large one in parts; return what the store says of it."""
        with self.writing():
            self._system.put_file(str(path), self.path(name))
            parent = self.path(name).rpartition("/")[0]
            info = next(each for each in self._system.ls(parent, detail=True) if each["name"] == self.path(name))
        if info["size"] != path.stat().st_size:
            raise OutputError(f"{self.url}/{name} arrived with {info['size']} bytes instead of {path.stat().st_size}.")
        return StoredFile(int(info["size"]), _tag(info))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.writing():
            self._system.pipe_file(self.path(name), data)

    def text(self, name: str) -> str:
        """Return the text of a small file; empty if the file does not exist."""
        with self.reading():
            try:
                return bytes(self._system.cat_file(self.path(name))).decode()
            except FileNotFoundError:
                return ""

    def remove(self, names: Sequence[str]) -> None:
        """Remove files; those that are gone already are no error, as S3 has it."""
        with self.writing():
            for name in names:
                with suppress(FileNotFoundError):
                    self._system.rm_file(self.path(name))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn the store's errors into RefError."""
        yield from self._errors(lambda why, hint: RefError(f"{self.url} cannot be read: {why}.", hint=hint))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the store's errors into OutputError."""
        yield from self._errors(lambda why, hint: OutputError(f"{self.url} cannot be written: {why}.", hint=hint))

    def _errors(self, error_of: Callable[[str, str | None], Exception]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not (reason := _reason(error, self._scheme, self._root.partition("/")[0])):
                raise
            raise error_of(*reason) from error


def check_address(url: str) -> None:
    """Raise RefError for an address without a bucket, UsageError if the extra of its store is missing."""
    scheme, _, root = stored_address(url).partition("://")
    if not root:
        raise RefError(f"{url} names no bucket.", hint="a folder is written s3://bucket/folder")
    if scheme in EXTRAS:
        require_extra(scheme, url)


def _quieten_gcsfs() -> None:
    """Have gcsfs log to a program's handlers only, and not look up a bucket's kind before each step."""
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").addHandler(logging.NullHandler())


def _tag(info: dict[str, Any]) -> str:
    """Return a hash of an object's bytes if the store has one: a late upload of the same bytes changes nothing."""
    return str(next((info[key] for key in TAGS if info.get(key)), "")).strip('"')


def _reason(error: Exception, scheme: str, bucket: str) -> tuple[str, str | None] | None:
    """Return the reason for a store's error and what helps, as users understand them; None for an error of ours."""
    name, text = type(error).__name__, (str(error).splitlines() or [""])[0]
    if isinstance(error, FileNotFoundError):
        return f"bucket {bucket} or the folder in it does not exist", "check the spelling, and the account"
    if "Credential" in name or "credential" in text.lower() or text.startswith(NOBODY):
        return f"no credentials were found ({text})", LOG_IN.get(scheme)
    denied = getattr(error, "status_code", 0) in (401, 403) or "Forbidden" in text or "AccessDenied" in text
    if denied or isinstance(error, PermissionError):
        return f"access to bucket {bucket} was refused ({text})", "the account needs the right to list, read and write"
    module = type(error).__module__.partition(".")[0]
    if isinstance(error, OSError) or module in ("botocore", "aiohttp", "azure", "gcsfs", "google", "asyncio"):
        return f"{name}: {text}", None
    return None


def listing_hash(files: dict[str, StoredFile]) -> str:
    """Return a hash of names, sizes and tags: it changes with any file of a folder."""
    lines = (f"{name} {file.size} {file.tag}" for name, file in sorted(files.items()))
    return xxhash.xxh3_64_hexdigest("\n".join(lines).encode())


def fetch_folder(url: str, session: Session) -> Source:
    """Download a whole folder, or one weight file, to a folder that is removed at the end."""
    store, name = ObjectStore(url), url.rstrip("/").rpartition("/")[2]
    files = store.files()
    if "" in files or list(files) == [store.path("").rstrip("/")]:
        store, files = ObjectStore(url.rstrip("/").rpartition("/")[0]), {name: StoredFile(0, "")}
        folder = session.temporary(name + xxhash.xxh3_64_hexdigest(url.encode()))
        store.fetch([name], folder)
        return Source(folder / name, name, url=stored_address(url))
    refuse_nothing(url, files)
    folder = session.temporary(xxhash.xxh3_64_hexdigest(url.encode())) / name
    store.fetch(list(files), folder)
    return Source(folder, name, commit=listing_hash(files), url=store.url)


def refuse_nothing(url: str, files: dict[str, StoredFile]) -> None:
    """Raise RefError for a folder without files: object stores know no others."""
    if not files:
        raise RefError(f"{url} holds no files.", hint="check the spelling; a folder is written s3://bucket/folder")


def open_stored(url: str, what: str, session: Session, *, records: bool = True) -> Checkpoint:
    """Open a checkpoint whose weights stay in the store: small files are downloaded, headers are read by ranges.

    Torch's pickles are downloaded whole, for their headers lie at the end. Without `records`, receipts are downloaded,
    but not the undo records beside them.
    """
    store, name = ObjectStore(url), url.rstrip("/").rpartition("/")[2]
    files = store.files()
    refuse_nothing(url, files)
    refuse_adapter([file for file in files if "/" not in file], f"{what} {name}")
    entry = weight_entry([file for file in files if "/" not in file], name)
    if entry.removesuffix(".index.json").endswith(PICKLES):
        return open_checkpoint(fetch_folder(url, session))
    folder = session.temporary(xxhash.xxh3_64_hexdigest(url.encode())) / name
    small = [file for file in files if file == entry.removesuffix(".safetensors") or not is_weight_file(file)]
    kept = RECEIPT if not records else ""
    small += [file for file in files if file.startswith(f"{RECORD}/") and file.endswith(kept)]
    store.fetch(sorted({*small, *([entry] if entry.endswith(".json") else [])}), folder)
    source = Source(folder, name, commit=listing_hash(files), url=store.url)
    table = weight_map(folder / entry) if entry.endswith(".json") else None
    shards = [entry] if table is None else shard_files(name, table, files.__contains__)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        headers = dict(
            zip(shards, pool.map(lambda file: _header(store, file, files[file].size, folder), shards), strict=True)
        )
    notes: list[str] = []
    sides, left = sort_files(file for file in files if file not in {entry, *shards})
    checkpoint = Checkpoint(source, assemble(name, headers, table, notes), entry if table is not None else None)
    return replace(checkpoint, config=read_config(folder), side_files=sides, left_behind=left, notes=tuple(notes))


def look_stored(url: str, session: Session) -> RefListing:
    """List a folder in an object store: an adapter is downloaded, but of a checkpoint only headers and small files."""
    store, name = ObjectStore(url), url.rstrip("/").rpartition("/")[2]
    files = store.files()
    refuse_nothing(url, files)
    names = tuple(file for file in files if "/" not in file)
    if list(files) == [store.path("").rstrip("/")] or "" in files:
        return RefListing(fetch_folder(url, session))
    if not detect(names):
        checkpoint = open_stored(url, "REF", session, records=False)
        return RefListing(checkpoint.source, names, checkpoint)
    folder = session.temporary(xxhash.xxh3_64_hexdigest(url.encode())) / name
    store.fetch(wanted_of_adapter(names), folder)
    return RefListing(Source(folder, name, commit=listing_hash(files), url=store.url), names)


def _header(store: ObjectStore, file: str, size: int, folder: Path) -> Header:
    """Return the header of a weight file, from one range or two."""
    head = store.read(file, [range(min(FIRST, size))])[0]
    length = min(8 + int.from_bytes(head[:8], "little"), size, 8 + MAX_HEADER)
    if len(head) < length:
        head += store.read(file, [range(len(head), length)])[0]
    return parse_header(folder / file, size, io.BytesIO(head))
