"""Read inputs on a node: at the driver's paths, or from object stores and the Hub, where the node has no such path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from ..sources import Session
from ..sources.object_store import ObjectStore
from ..sources.range_reader import RangeReader
from ..storage.filenames import FileStates
from ..storage.reader import Reader

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..storage.refs import HubRef, Source
    from ..storage.safetensors import StoredTensor

MOST_DOWNLOADED = 1 << 30
"""Adapters in stores are downloaded up to so many bytes, for their tensors are small. Others are read by ranges."""


@dataclass(frozen=True)
class NodeFiles:
    """The files of a plan's inputs that a node gets from elsewhere, by the paths that the driver has them at."""

    ranges: Mapping[Path, tuple[str, str]] = field(default_factory=dict)
    """Files that are read by ranges: the address of the folder in a store, and the name in it."""
    stored: Mapping[Path, tuple[str, str]] = field(default_factory=dict)
    """Files in stores that are downloaded."""
    hub: Mapping[Path, tuple[HubRef, str]] = field(default_factory=dict)
    """Files on the Hub, which are downloaded to the node's cache."""

    @classmethod
    def of(cls, plan: Plan) -> NodeFiles:
        """Return the files of a plan that come from stores or from the Hub."""
        base = list(_named(plan.base.source, plan.base.tensors.values()))
        adapters = [each for adapter in plan.adapters for each in _named(adapter.source, adapter.tensors.values())]
        small = sum(path.stat().st_size for path, _, _ in adapters if path.is_file()) <= MOST_DOWNLOADED
        stored = {path: (source.url, name) for path, source, name in adapters if source.url}
        ranges = {path: (source.url, name) for path, source, name in base if source.url}
        hub = {path: (source.hub, name) for path, source, name in (*base, *adapters) if source.repo}
        return cls(ranges | ({} if small else stored), stored if small else {}, hub)

    def reader(self, session: Session) -> Reader:
        """Return a reader of all inputs; `session` keeps what is downloaded from stores."""
        return NodeReader(self, session)


def _named(source: Source, tensors: Iterable[StoredTensor]) -> Iterator[tuple[Path, Source, str]]:
    """Yield the files of an input that is in a store or on the Hub, each with its name there."""
    if not (source.url or source.repo):
        return
    root = source.path.parent if source.path.is_file() else source.path
    for path in dict.fromkeys(path for tensor in tensors for path in tensor.paths):
        yield path, source, path.relative_to(root).as_posix()


def shared_files(plan: Plan) -> list[FileStates]:
    """Return the files of a plan that every node must see: those that are neither in a store nor on the Hub."""
    inputs = [(plan.base.source, plan.base.states), *((each.source, each.states) for each in plan.adapters)]
    return [states for source, states in inputs if not (source.url or source.repo)]


def stores_of(plan: Plan) -> dict[str, str | None]:
    """Return the addresses of a plan's inputs in object stores, and the hashes of their listings, if they are known."""
    sources = [plan.base.source, *(adapter.source for adapter in plan.adapters)]
    return {source.url: source.commit for source in sources if source.url}


def is_shared(path: Path) -> bool:
    """Return True if this machine has a file at the driver's path."""
    return path.is_file()


class NodeReader(RangeReader):
    """A reader that downloads a file when it is first opened, unless it is at the driver's path."""

    def __init__(self, files: NodeFiles, session: Session) -> None:
        store = cache(ObjectStore)
        super().__init__({path: (store(_folder(url, name)), name) for path, (url, name) in files.ranges.items()})
        self._elsewhere, self._session, self._store = files, session, store
        self._found: dict[Path, Path] = {}
        self._finding = Lock()

    def using(self, path: Path) -> AbstractContextManager[int]:
        """Lend the descriptor of a file, once the file is on this machine."""
        if path in self._elsewhere.stored or path in self._elsewhere.hub:
            path = self._here(path)
        return self._files.using(path)

    def _here(self, path: Path) -> Path:
        """Return the place of a file on this machine; download the file if it is new."""
        with self._finding:
            if path not in self._found:
                self._found[path] = path if is_shared(path) else self._download(path)
            return self._found[path]

    def _download(self, path: Path) -> Path:
        if path in self._elsewhere.hub:
            from ..sources.download import download
            from ..sources.hub_client import reading_errors, without_bars

            ref, name = self._elsewhere.hub[path]
            with reading_errors(ref, "Repo"), without_bars():
                return download(ref, name, self._session)
        url, name = self._elsewhere.stored[path]
        folder = self._session.temporary(f"inputs/{len(self._found)}")
        self._store(_folder(url, name)).fetch([name], folder)
        return folder / name


def _folder(url: str, name: str) -> str:
    """Return the address of the folder that holds a file: an input may be named by its one file."""
    return url.removesuffix(f"/{name}")
