"""Stream a merge from an object store, and to one: shards are uploaded as they are finished, and the entry last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import msgspec
import xxhash

from ..errors import OutputError, RefError
from ..output.folder import OutputFolder
from ..plan.plan import Plan
from ..reports.push import Pushed, PushedFile
from ..sources.object_store import ObjectStore, StoredFile, listing_hash
from ..sources.prefetch import MOST_FILES, Prefetch, shard_needs
from ..sources.range_reader import RangeReader
from ..storage.filenames import JOURNAL, RECEIPT, RECORD, UPLOADS, list_files
from ..storage.journal import sync_path
from ..storage.reader import Reader
from ..storage.refs import PathLike
from .streaming import NOT_OF_OUT, HubStreaming

if TYPE_CHECKING:
    from ..cluster.shards import Destination

ENTRIES = (".index.json", "config.json", "model_index.json", RECEIPT)
"""Ends of the files that loaders begin with: uploaded last, and removed first."""


def transit_folder(out: str, refs: Sequence[PathLike | None]) -> Path:
    """Return the folder in the user's cache that the output's files pass through on their way to the store."""
    from huggingface_hub import constants

    key = xxhash.xxh3_64_hexdigest("\n".join([out, *map(str, refs)]).encode())
    return Path(constants.HF_HOME) / "dora_convert" / "merges" / key / "model"


class StoreUpload:
    """Uploads the files of one output to an object store, and keeps account of them."""

    def __init__(self, url: str, folder: OutputFolder) -> None:
        """Compare the account of an unfinished run with the store; without agreement the run begins anew."""
        self.store, self._account = ObjectStore(url), folder.state / UPLOADS
        self.present = self.store.files()
        self._mine, self.sent, self._noting = self._account.exists(), list[PushedFile](), Lock()
        account = self._read()
        self.done = account or {}
        if account is None or self._changed(self.present):
            (folder.state / JOURNAL).unlink(missing_ok=True)  # local shards may be hollow
            self.done = {}

    def _read(self) -> dict[str, StoredFile] | None:
        """Return the account of an unfinished run; None without a valid one."""
        try:
            return msgspec.json.decode(self._account.read_bytes(), type=dict[str, StoredFile])
        except (OSError, msgspec.DecodeError):
            return None

    def _changed(self, present: Mapping[str, StoredFile]) -> list[str]:
        """Return the files of the account that are not in the store as they were uploaded."""
        return [name for name, file in self.done.items() if present.get(name) != file]

    def refuse_existing(self, *, overwrite: bool) -> None:
        """Raise OutputError for a folder with files of others, or with an output that may not be replaced."""
        if not self.present or self._mine:
            return
        if f"{RECORD}/{RECEIPT}" not in self.present and f"{RECORD}/{UPLOADS}" not in self.present:
            raise OutputError(
                f"OUT {self.store.url} exists and was not written by dora-convert; it is not replaced.",
                hint="choose another name, or remove it yourself",
            )
        if not overwrite:
            raise OutputError(f"OUT {self.store.url} exists.", hint="choose another name, or --overwrite")

    def keep_journal(self, path: Path, *, by_name: bool) -> None:
        """Mark the store's folder as unfinished and ours; the account is `path`.

        If it is gone by now, the run begins anew, maybe with other inputs, and every shard is uploaded.
        """
        del by_name
        self._account, self.done = path, self.done if path.exists() else {}
        self._note({})
        self.store.put(f"{RECORD}/{UPLOADS}", path)
        self.store.remove([name for name in self.present if name.endswith(ENTRIES) and name not in self.done])

    def send(self, name: str, path: Path) -> None:
        """Upload one file, unless it is uploaded already."""
        state = "unchanged"
        if any(file.path == name for file in self.sent):
            return
        if name not in self.done:
            file, state = self.store.put(name, path), "uploaded"
            self._note({name: file})
        self.sent.append(PushedFile(name, self.done[name].size, state))

    def enter(self, files: Mapping[str, StoredFile]) -> None:
        """Enter files that nodes of a cluster have uploaded."""
        self._note(files)
        self.sent += [PushedFile(name, file.size, "uploaded") for name, file in files.items()]

    def _note(self, files: Mapping[str, StoredFile]) -> None:
        """Add files to the account, and write it anew: a kill leaves the old one or the new one."""
        new = self._account.parent.with_name(UPLOADS)
        with self._noting:
            self.done |= files
            new.write_bytes(msgspec.json.encode(self.done))
            sync_path(new)
            new.replace(self._account)
            sync_path(self._account.parent)

    def finish(self, folder: Path, names: Sequence[str]) -> tuple[str, ...]:
        """Upload all other files, those that loaders begin with last; remove what is not of this output.

        Raises OutputError if an uploaded file is not in the store any more as it was uploaded.
        """
        if changed := self._changed(self.store.files()):
            raise OutputError(
                f"{self.store.url}/{changed[0]} changed after it was uploaded.",
                hint="does another run write there? rerun the same command to begin anew",
            )
        for name in sorted(names, key=lambda name: (name.endswith(ENTRIES), name)):
            if name not in {file.path for file in self.sent}:
                self.done.pop(name, None)  # a file of an earlier attempt may have other contents
                self.send(name, folder / name)
        stale = tuple(sorted({*self.present, f"{RECORD}/{UPLOADS}"} - {*names} - {file.path for file in self.sent}))
        self.store.remove(stale)
        return stale

    def close(self) -> None:
        """Do nothing: the account is written after every file."""


class StoreStreaming(HubStreaming):
    """Reads a plan's base from an object store by ranges, or uploads its output to one, or both."""

    def __init__(
        self, upload: StoreUpload | None, inputs: Prefetch | None, base: ObjectStore | None, plan: Plan, *, nodes: bool
    ) -> None:
        """`nodes`: the nodes of a cluster make shards, and upload them unless OUT is a folder."""
        super().__init__(upload, inputs, local=upload is None, nodes=nodes)
        self._to, self._from, self._plan = upload, base, plan

    def destination(self) -> Destination:
        """Return the place that nodes upload shards to."""
        from .node_upload import StoreDestination

        assert self._to
        return StoreDestination(self._to.store.url)

    def arrived(self, files: Mapping[str, StoredFile]) -> None:
        """Enter shards that nodes have uploaded, before the journal counts them as done."""
        assert self._to
        self._to.enter(files)

    def reader(self) -> Reader:
        """Return a reader of local files, and of the base's ranges."""
        if not self._from:
            return super().reader()
        store = self._from
        return RangeReader({path: (store, name) for path, name in _names(self._plan).items()}, self._inputs)

    def settle(self) -> None:
        """Wait until all finished shards are uploaded; RefError if the base has changed meanwhile."""
        super().settle()
        if self._from and listing_hash(self._from.files()) != self._plan.base.source.commit:
            raise RefError(f"{self._from.url} changed while it was read.", hint="rerun the same command")

    def finish(self, readme: bytes, message: str) -> Pushed | None:
        """Upload the remaining files, the entry of the model last; None if nothing is uploaded."""
        del readme, message  # the folder has the card
        if not self._to:
            return None
        names = [name for name in list_files(self._folder) if name not in NOT_OF_OUT]
        stale = self._to.finish(self._folder, names)
        files = tuple(self._to.sent)
        nbytes = sum(file.bytes for file in files if file.state == "uploaded")
        url = self._to.store.url
        return Pushed(repo=url, url=url, commit="", files=files, deleted=stale, bytes_uploaded=nbytes)


def _names(plan: Plan) -> Mapping[Path, str]:
    """Return the names in the store of the base's weight files, by their paths."""
    root = plan.base.source.path
    paths = {tensor.path for tensor in plan.base.tensors.values()}
    return {path: path.relative_to(root).as_posix() for path in paths}


@contextmanager
def stream_stores(
    plan: Plan, out: str | None, folder: OutputFolder, *, overwrite: bool, nodes: bool
) -> Iterator[StoreStreaming]:
    """Stream a merge whose base stays in an object store, or whose output goes to one, `out`."""
    upload = StoreUpload(out, folder) if out else None
    if upload:
        upload.refuse_existing(overwrite=overwrite)
    inputs = (
        Prefetch(shard_needs(plan), None, keep=True, most_files=MOST_FILES, outputs=True)
        if upload and not nodes
        else None
    )
    base = ObjectStore(plan.base.source.url) if plan.base.source.url and not plan.base.is_here else None
    streaming = StoreStreaming(upload, inputs, base, plan, nodes=nodes)
    try:
        yield streaming
    finally:
        streaming.close()
