"""What comes from the Hub and goes to it while a merge runs: inputs before they are read, shards when they are made."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..output.folder import LOCK, OutputFolder
from ..output.shards import ShardFiles
from ..plan.plan import Plan
from ..reports.push import Pushed
from ..sources.hub_client import without_bars
from ..sources.prefetch import PLACES, Prefetch, WeightDownload, expect, shard_needs
from ..sources.session import Session
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import JOURNAL, RECORD, SPOOL, UPLOADS, list_files
from ..storage.reader import Reader
from .commit import Shards, commit, is_large
from .target import INCOMING, HubRoutes
from .upload import Upload
from .upload_journal import refusals

NOT_OF_OUT = {LOCK, *(f"{RECORD}/{name}" for name in (JOURNAL, UPLOADS, SPOOL))}
"""Files of OUT.partial that OUT does not have."""


class HubStreaming:
    """One merge's inputs and outputs, on their ways."""

    def __init__(self, upload: Upload | None, arrivals: Prefetch | None, *, local: bool) -> None:
        self._upload, self._arrivals, self.local = upload, arrivals, local
        self._shards: Shards | None = None
        self._files: ShardFiles
        self._folder: Path

    def enter(self, folder: Path) -> None:
        """Begin with OUT.partial, or go on from where an earlier run was cut off."""
        self._folder = folder
        if self._upload:
            self._upload.remember(folder / RECORD / UPLOADS, by_name=not self.local)
            self._shards = Shards(self._upload, folder, self._sent)

    def most(self, plan: Plan) -> int:
        """Bytes that the outputs take on the disk at a time."""
        largest = max(sum(item.nbytes for item in shard.items) for shard in plan.shards)
        return plan.bytes_out if self.local else min(plan.bytes_out, PLACES * largest)

    def reader(self) -> Reader:
        """Reads inputs once they are here."""
        return self._arrivals.reader() if self._arrivals else Reader()

    def attach(self, files: ShardFiles) -> None:
        """The shards that are being made."""
        self._files = files

    def made(self, shard: str) -> None:
        """A shard is finished and checked."""
        if self._arrivals:
            self._arrivals.done(shard)
        if self._shards:
            self._shards.add(shard)

    def _sent(self, shard: str) -> None:
        if not self.local:
            self._files.hollow(shard)
            if self._arrivals:
                self._arrivals.gone(shard)

    def settle(self) -> None:
        """Wait for all shards to be up: their files may be closed then."""
        if self._shards:
            self._shards.wait()

    def finish(self, readme: bytes, message: str) -> Pushed | None:
        """Upload what is not up yet and commit everything that OUT will hold."""
        shutil.rmtree(self._folder / RECORD / INCOMING, ignore_errors=True)
        if not self._upload:
            return None
        names = [name for name in list_files(self._folder) if name not in NOT_OF_OUT]
        for name in names:
            path = self._folder / name
            if is_large(name, path.stat().st_size) and not self._upload.has(name):
                self._upload.send(name, path)
        return commit(self._upload, self._folder, names, readme, message)

    def close(self) -> None:
        """Stop; what is up stays known to the same command."""
        if self._shards:
            self._shards.abandon()
        if self._arrivals:
            self._arrivals.close()
        if self._upload:
            self._upload.close()


@contextmanager
def traffic(
    plan: Plan, routes: HubRoutes, session: Session, folder: OutputFolder
) -> Iterator[HubStreaming | None]:
    """What a merge has to do with the Hub while it runs; None where that is nothing."""
    upload = None
    if routes.target:
        upload = Upload(routes.target, session.notify)
        upload.open()
        upload.offer(plan.base.source.repo, plan.base.source.commit)
        if not routes.local:
            _refuse_orphans(folder, upload)
    far = not plan.base.is_here
    arrivals = None
    if far or not routes.local:
        bring = WeightDownload([plan.base], session, routes.weights(folder)) if far else None
        places = None if routes.local and routes.cache else PLACES
        needs = shard_needs(plan)
        arrivals = Prefetch(needs, bring, keep=routes.cache, places=places, outputs=not routes.local)
    if not (upload or arrivals):
        yield None
        return
    made = HubStreaming(upload, arrivals, local=routes.local)
    try:
        with without_bars():
            yield made
    finally:
        made.close()


@contextmanager
def inward(plan: Plan, others: Sequence[Checkpoint], session: Session) -> Iterator[HubStreaming | None]:
    """What a plan reads of its base and of other checkpoints on the Hub while it runs; None where all of it is here."""
    needs = shard_needs(plan, *others)
    arrivals = expect((plan.base, *others), needs, session)
    if not arrivals:
        yield None
        return
    made = HubStreaming(None, arrivals, local=True)
    try:
        with without_bars():
            yield made
    finally:
        made.close()


def _refuse_orphans(folder: OutputFolder, upload: Upload) -> None:
    """Start over where nothing tells which shards are up: those here may be hollow."""
    refused = refusals(folder.state / UPLOADS, upload.key)
    if refused is None or refused:
        (folder.state / JOURNAL).unlink(missing_ok=True)
    upload.refused = refused or frozenset()
