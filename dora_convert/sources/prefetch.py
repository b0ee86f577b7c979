"""Download weight files ahead of their use: the next file while the current one is worked on.

A merge that keeps no files limits their number on the disk. An input counts from the start of its download
until its last use, an output from its first tensor until it is uploaded. Three files are enough to download
the next input during a merge of a shard, or to upload one output during the computation of the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path

from ..errors import HubError
from ..plan.plan import Plan
from ..storage.checkpoint import Checkpoint
from ..storage.journal import Background
from ..storage.reader import Reader
from . import Session
from .download import download, download_all, hashes_of
from .hub_client import reading_errors, without_bars

MOST_FILES = 3
"""Weight files on the disk at once, if files are limited."""
Needs = Mapping[str, Collection[Path]]
"""The files that each task reads; tasks and files in the order in which they are needed."""


class Prefetch:
    """The downloads of a run's input files; its methods are called by workers."""

    def __init__(
        self,
        needs: Needs,
        download: Callable[[Path], None] | None,
        *,
        keep: bool,
        most_files: int | None = None,
        outputs: bool = False,
        local: Collection[Path] = (),
    ) -> None:
        """Start the downloads; without `download` all files are local.

        `keep`: files stay after their last use. `most_files`: limit of the files on the disk; with `outputs`
        the output shards count, too. `local`: files that need no download.
        """
        self._download_file, self._keep = download, keep
        self._needs = needs
        self.inputs = list(dict.fromkeys(path for paths in needs.values() for path in paths))
        self._users = {path: {task for task, paths in needs.items() if path in paths} for path in self.inputs}
        most = max((len(paths) for paths in needs.values()), default=1)
        self._begins = Counter(next(iter(paths)) for paths in needs.values() if paths and outputs)
        together = max(2, *self._begins.values(), 0)  # outputs of one input are begun at once
        self._free = float("inf") if most_files is None else max(most_files, most + together)
        self._begun: set[Path] = set()
        self._local: set[Path] = set(local if download else self.inputs)
        self._requested: set[Path] = set()
        self._readers: list[Reader] = []
        self._thread = Background("download", self._download, claim=self._claim)
        self._changed, self.fail = self._thread.changed, self._thread.fail

    def reader(self) -> Reader:
        """Return a reader that waits for downloads, and closes files before they are removed."""
        reader = Reader(self)
        self._readers.append(reader)
        return reader

    def need(self, path: Path) -> None:
        """Wait until a file is downloaded and its output has room; raises the download's error."""
        with self._changed:
            if path not in self._users:
                if path.is_file():
                    return
                self._users[path] = set()  # read by no task of `needs`: the file stays
            self._request(path)
            self._wait(lambda: path in self._local)
            outputs = self._begins[path]
            self._wait(lambda: path in self._begun or self._free >= outputs)
            if path not in self._begun:
                self._begun.add(path)
                self._free -= outputs
                self._request_next(path)

    def done(self, task: str) -> None:
        """Note the end of a task, and remove the inputs that no other task needs."""
        with self._changed:
            for path in self._needs.get(task, ()):
                self._users[path].discard(task)
                if not self._users[path] and path in self._local and self._download_file and not self._keep:
                    self._local.discard(path)
                    self._requested.discard(path)
                    for reader in self._readers:
                        reader.forget(path)
                    path.unlink(missing_ok=True)
                    self._free += 1
            self._changed.notify_all()

    def uploaded(self, output: str) -> None:
        """Note that an output of this run is uploaded and takes no space on the disk any more."""
        with self._changed:
            first = next(iter(self._needs[output]), None)
            if first in self._begun:
                self._free += 1
            elif first:
                self._begins[first] -= 1  # uploaded by an earlier run
            self._changed.notify_all()

    def close(self) -> None:
        """Start no further download, and wake every thread that waits."""
        self._thread.stop()

    def _request(self, path: Path) -> None:
        if path not in self._local and path not in self._requested:
            self._requested.add(path)
            self._thread.put(path)

    def _request_next(self, path: Path) -> None:
        later = self.inputs[self.inputs.index(path) + 1 :] if path in self.inputs else ()
        if following := next((other for other in later if self._users[other]), None):
            self._request(following)

    def _wait(self, ready: Callable[[], bool]) -> None:
        if not self._thread.wait_for(ready):
            raise HubError("The run was stopped while it waited for its input.")

    def _claim(self) -> bool:
        """Take room on the disk for the next download; return False if there is none."""
        if self._keep:
            return True
        if self._free < 1:
            return False
        self._free -= 1
        return True

    def _download(self, paths: list[Path]) -> None:
        for path in paths:
            assert self._download_file
            self._download_file(path)
            with self._changed:
                self._local.add(path)
                self._changed.notify_all()


def shard_needs(plan: Plan, *others: Checkpoint) -> Needs:
    """Return, for each output shard, the files of the base and of other checkpoints that the shard reads."""
    weights = {tensor.path for each in (plan.base, *others) for tensor in each.tensors.values()}
    needs = {shard.filename: dict.fromkeys(path for path in shard.inputs if path in weights) for shard in plan.shards}
    for tensor in plan.lost:
        needs[plan.lost_with[tensor.name]].setdefault(tensor.path)
    return needs


def weight_download(
    checkpoints: Iterable[Checkpoint], session: Session, folder: Path | None = None
) -> Callable[[Path], None]:
    """Return a function that downloads one weight file, by default into the session's folder or the cache."""
    names = {
        tensor.path: (each.source.hub, shard.filename)
        for each in checkpoints
        for shard in each.shards
        for tensor in shard.tensors
    }
    hashes = cache(lambda ref: hashes_of(ref, session))

    def download_file(path: Path) -> None:
        if path in names:  # other paths are left for their reader to refuse
            ref, name = names[path]
            with reading_errors(ref, "Repo"):
                session.notify(f"downloading {name}")
                download(ref, name, session, folder=folder, sha256=hashes(ref).get(name))

    return download_file


def download_weights(checkpoint: Checkpoint, session: Session, files: Collection[Path] | None = None) -> None:
    """Download a checkpoint's weights, or only some of its files, unless its weights are local."""
    if checkpoint.is_here:
        return
    names = [
        shard.filename
        for shard in checkpoint.shards
        if files is None or any(tensor.path in files for tensor in shard.tensors)
    ]
    with reading_errors(checkpoint.source.hub, "Repo"):
        download_all(checkpoint.source.hub, names, session)


def prefetch(checkpoints: Iterable[Checkpoint], needs: Needs, session: Session) -> Prefetch | None:
    """Return the downloads that a run needs; None if all weights are local.

    With the cache, all files are downloaded now. Without it, a file is downloaded for its first reader and
    removed after the last task that needs it.
    """
    remote = [checkpoint for checkpoint in checkpoints if not checkpoint.is_here]
    if not remote:
        return None
    weights = {tensor.path for checkpoint in remote for tensor in checkpoint.tensors.values()}
    # only files that are downloaded: a prefetched file is removed, a local one never
    needs = {task: tuple(path for path in paths if path in weights) for task, paths in needs.items()}
    local: set[Path] = set()
    if session.cache:
        local = {path for paths in needs.values() for path in paths}
        for checkpoint in remote:
            download_weights(checkpoint, session, local)
    return Prefetch(needs, weight_download(remote, session), keep=session.cache, local=local)


@contextmanager
def reading(checkpoints: Iterable[Checkpoint], needs: Needs, session: Session) -> Iterator[Reader]:
    """Open a reader of checkpoints whose weights may be on the Hub."""
    with ExitStack() as stack:
        if inputs := prefetch(checkpoints, needs, session):
            stack.enter_context(without_bars())
            stack.callback(inputs.close)
        yield stack.enter_context(closing(inputs.reader() if inputs else Reader()))
