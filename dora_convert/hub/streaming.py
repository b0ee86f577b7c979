"""Stream a merge's inputs from the Hub ahead of their use, and its shards to the Hub as they are finished."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..output.folder import LOCK, OutputFolder
from ..output.shards import ShardFiles
from ..plan.plan import Plan
from ..reports.push import Pushed
from ..sources import Session
from ..sources.hub_client import without_bars
from ..sources.prefetch import MOST_FILES, Prefetch, prefetch, shard_needs, weight_download
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import CLAIM, INCOMING, JOURNAL, RECORD, SPOOL, UPLOADS, list_files
from ..storage.journal import Background
from ..storage.reader import Reader
from .commit import commit_folder
from .local_paths import Outgoing
from .target import PushTarget
from .upload import Upload
from .upload_journal import refused_copies

if TYPE_CHECKING:
    from ..cluster.shards import Destination
    from ..sources.object_store import StoredFile

NOT_OF_OUT = {LOCK, *(f"{RECORD}/{name}" for name in (JOURNAL, UPLOADS, SPOOL, CLAIM))}
"""Files of OUT.partial that are not part of OUT."""


class ShardUpload(Protocol):
    """Sends the files of one output away."""

    def keep_journal(self, path: Path, *, by_name: bool) -> None:
        """Note in a journal what is uploaded, and resume from it; `by_name` if local shards may be hollow."""

    def send(self, name: str, path: Path) -> None:
        """Upload one file, unless it is uploaded already."""

    def close(self) -> None:
        """Stop."""


class HubStreaming:
    """Streams the inputs of one plan from the Hub, and its outputs to the Hub."""

    def __init__(
        self, upload: ShardUpload | None, inputs: Prefetch | None, *, local: bool, nodes: bool = False
    ) -> None:
        """`nodes`: the nodes of a cluster make shards, and upload them unless OUT stays here."""
        self._upload, self._inputs, self.local, self._nodes = upload, inputs, local, nodes
        self._uploads: Background[str] = Background("upload", self._send)
        self._shards: ShardFiles
        self._folder: Path

    def begin(self, folder: Path, shards: ShardFiles) -> None:
        """Start or resume the uploads from OUT.partial, whose shards are open."""
        self._folder, self._shards = folder, shards
        if self._upload:
            self._upload.keep_journal(folder / RECORD / UPLOADS, by_name=not self.local)

    def room(self, plan: Plan) -> int:
        """Return the most bytes that the outputs take on this machine's disk at once."""
        if self._nodes and not self.local:
            return 0
        largest = max(sum(item.nbytes for item in shard.items) for shard in plan.shards)
        return plan.bytes_out if self.local else min(plan.bytes_out, MOST_FILES * largest)

    def destination(self) -> Destination:
        """Return the place that nodes upload shards to."""
        from .node_upload import HubDestination

        assert isinstance(self._upload, Upload)
        return HubDestination(self._upload.repo, self._upload.target.create_pr)

    def arrived(self, files: Mapping[str, StoredFile]) -> None:
        """Enter shards that nodes have uploaded, before the journal counts them as done."""
        assert isinstance(self._upload, Upload)
        for name, file in files.items():
            self._upload.arrived(name, file.size, file.tag)

    def reader(self) -> Reader:
        """Return a reader that waits for files until they are downloaded."""
        return self._inputs.reader() if self._inputs else Reader()

    def shard_finished(self, shard: str) -> None:
        """Drop inputs that only a finished and checked shard needed, and upload the shard."""
        if self._inputs:
            self._inputs.done(shard)
        if self._upload:
            self._uploads.put(shard)

    def _send(self, shards: list[str]) -> None:
        try:
            for shard in shards:
                self._send_one(shard)
        except BaseException as error:
            if self._inputs:
                self._inputs.fail(error)  # workers may wait for the room that this upload would have made
            raise

    def _send_one(self, shard: str) -> None:
        assert self._upload
        self._upload.send(shard, self._folder / shard)
        if not self.local:
            self._shards.hollow(shard)
            if self._inputs:
                self._inputs.uploaded(shard)

    def settle(self) -> None:
        """Wait until all finished shards are uploaded."""
        self._uploads.finish()

    def finish(self, readme: bytes, message: str) -> Pushed | None:
        """Upload the remaining files of OUT.partial and commit; None if nothing is pushed."""
        shutil.rmtree(self._folder / RECORD / INCOMING, ignore_errors=True)
        if not isinstance(self._upload, Upload):
            return None
        names = [name for name in list_files(self._folder) if name not in NOT_OF_OUT]
        outgoing = Outgoing(self._folder, None, given=False, notify=self._upload.notify)
        outgoing.add_configs(names)
        return commit_folder(self._upload, self._folder, names, readme, message, edited=outgoing.files)

    def close(self) -> None:
        """Stop downloads and uploads; the journal of the uploads stays for the next run."""
        self._uploads.stop()
        if self._inputs:
            self._inputs.close()
        if self._upload:
            self._upload.close()


@contextmanager
def stream_merge(
    plan: Plan, target: PushTarget | None, session: Session, folder: OutputFolder, *, weights: Path | None, nodes: bool
) -> Iterator[HubStreaming | None]:
    """Stream a merge's base from the Hub and its output to the Hub; None if neither is needed.

    `weights` is the folder for the base's weights; None stands for the cache. `nodes`: a cluster makes the shards.
    """
    local, upload = target is None or target.local, None
    if target:
        upload = Upload(target, session.notify)
        upload.open()
        upload.copy_from(plan.base.source.repo, plan.base.source.commit)
        if not local:
            _refuse_orphans(folder, upload)
    inputs, remote = None, not plan.base.is_here
    if remote if local else not nodes:
        inputs = Prefetch(
            shard_needs(plan),
            weight_download([plan.base], session, weights) if remote else None,
            keep=session.cache,
            most_files=None if local and session.cache else MOST_FILES,
            outputs=not local,
        )
    with _streaming(upload, inputs, local=local, nodes=nodes) as hub:
        yield hub


@contextmanager
def stream_inputs(plan: Plan, others: Sequence[Checkpoint], session: Session) -> Iterator[HubStreaming | None]:
    """Stream a plan's base and other checkpoints from the Hub; None if all weights are local."""
    inputs = prefetch((plan.base, *others), shard_needs(plan, *others), session)
    with _streaming(None, inputs, local=True) as hub:
        yield hub


@contextmanager
def _streaming(
    upload: Upload | None, inputs: Prefetch | None, *, local: bool, nodes: bool = False
) -> Iterator[HubStreaming | None]:
    if not (upload or inputs):
        yield None
        return
    hub = HubStreaming(upload, inputs, local=local, nodes=nodes)
    try:
        with without_bars():
            yield hub
    finally:
        hub.close()


def _refuse_orphans(folder: OutputFolder, upload: Upload) -> None:
    """Remove the run's journal if no upload journal names the uploaded shards: local shards may be hollow."""
    refused = refused_copies(folder.state / UPLOADS, upload.key)
    if refused is None or refused:
        (folder.state / JOURNAL).unlink(missing_ok=True)
    upload.refused_copies = refused or frozenset()
