"""Weight files on their way here, each before it is first read, the next one while one is worked on.

Where those of a merge are not to stay, they are counted: an input that is here or arriving takes a place, and so does
an output from its first tensor until it is on the Hub. With three places the next input arrives while one shard is
merged, or one output is uploaded while the next is made, and the disk never holds more than three shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from ..errors import HubError
from ..plan.plan import Plan
from ..storage.background import Background
from ..storage.checkpoint import Checkpoint
from ..storage.reader import Reader
from ..storage.refs import HubRef, Source
from .download import download, download_all, hashes_of
from .hub_client import explained, without_bars
from .session import Session

PLACES = 3
Needs = Mapping[str, Collection[Path]]
"""The files that each piece of work reads, pieces and files in the order in which they are needed."""


class Prefetch:
    """Downloads the input files of some work before workers read them, and removes them afterwards. Thread-safe."""

    def __init__(
        self,
        needs: Needs,
        bring: Callable[[Path], None] | None,
        *,
        keep: bool,
        places: int | None = None,
        outputs: bool = False,
        here: Collection[Path] = (),
    ) -> None:
        """`bring` downloads a file, None where all are here; without `keep` files are removed after their last use.

        `places` bounds what is on the disk, None does not; with `outputs`, the shards that are made take places, too.
        Files that are `here` need not come.
        """
        self._bring, self._keep = bring, keep
        self._outputs = needs
        self._users = {
            path: {name for name, needs in self._outputs.items() if path in needs} for path in self.inputs
        }
        most = max((len(needs) for needs in self._outputs.values()), default=1)
        self._free = float("inf") if places is None else max(places, most + 2)
        self._begins = Counter(next(iter(needs)) for needs in self._outputs.values() if needs and outputs)
        self._begun: set[Path] = set()
        self._here: set[Path] = set(here if bring else self.inputs)
        self._asked: set[Path] = set()
        self._readers: list[Reader] = []
        self._thread = Background("download", self._download, claim=self._claim)
        self._changed = self._thread.changed

    @property
    def inputs(self) -> list[Path]:
        """The base's files, in the order in which they are needed."""
        return list(dict.fromkeys(path for needs in self._outputs.values() for path in needs))

    def reader(self) -> Reader:
        """Reads files once they are here, and has those closed that are about to be removed."""
        reader = Reader(self)
        self._readers.append(reader)
        return reader

    def need(self, path: Path) -> None:
        """Wait until a file is here, and until there is a place for what is made of it; raises what went wrong."""
        with self._changed:
            if path not in self._users:
                if path.is_file():
                    return
                self._users[path] = set()  # read besides the work that was told of: it stays
            self._ask(path)
            self._wait(lambda: path in self._here)
            outputs = self._begins[path]
            self._wait(lambda: path in self._begun or self._free >= outputs)
            if path not in self._begun:
                self._begun.add(path)
                self._free -= outputs
                self._ask_next(path)

    def done(self, output: str) -> None:
        """An output is made, or another piece of work done: inputs that nothing else needs go."""
        with self._changed:
            for path in self._outputs.get(output, ()):
                self._users[path].discard(output)
                if not self._users[path] and path in self._here and self._bring and not self._keep:
                    self._here.discard(path)
                    self._asked.discard(path)
                    for reader in self._readers:
                        reader.forget(path)
                    path.unlink(missing_ok=True)
                    self._free += 1
            self._changed.notify_all()

    def gone(self, output: str) -> None:
        """An output that was begun in this run takes no place any more."""
        with self._changed:
            needs = self._outputs[output]
            if needs and next(iter(needs)) in self._begun:
                self._free += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Ask for nothing more."""
        self._thread.stop()

    def _ask(self, path: Path) -> None:
        if path not in self._here and path not in self._asked:
            self._asked.add(path)
            self._thread.put(path)

    def _ask_next(self, path: Path) -> None:
        later = self.inputs[self.inputs.index(path) + 1 :] if path in self.inputs else ()
        if following := next((other for other in later if self._users[other]), None):
            self._ask(following)

    def _wait(self, ready: Callable[[], bool]) -> None:
        if not self._thread.wait_for(ready):
            raise HubError("The run was stopped while it waited for its input.")

    def _claim(self) -> bool:
        """Take a free place for the next file to download; return False if there is none."""
        if self._keep:
            return True
        if self._free < 1:
            return False
        self._free -= 1
        return True

    def _download(self, paths: list[Path]) -> None:
        for path in paths:
            assert self._bring
            self._bring(path)
            with self._changed:
                self._here.add(path)
                self._changed.notify_all()


def shard_needs(plan: Plan, *more: Checkpoint) -> Needs:
    """For each output shard the files of the base, and of other checkpoints, that it is made of."""
    base = {tensor.path for each in (plan.base, *more) for tensor in each.tensors.values()}
    found = {
        shard.filename: dict.fromkeys(path for path in shard.inputs if path in base) for shard in plan.shards
    }
    for tensor in plan.lost:
        found[plan.lost_with[tensor.name]].setdefault(tensor.path)
    return found


class WeightDownload:
    """Downloads single weight files of checkpoints, with the word of it."""

    def __init__(self, checkpoints: Iterable[Checkpoint], session: Session, top: Path | None = None) -> None:
        """`top` is where repos' files come to, if not to where the visit has them."""
        self._of = {tensor.path: each.source for each in checkpoints for tensor in each.tensors.values()}
        self._session, self._top = session, top
        self._hashes: dict[Source, dict[str, str]] = {}

    def __call__(self, path: Path) -> None:
        """Download one; nothing where it is no file of theirs."""
        if path not in self._of:
            return  # whoever opens it says so
        source, session = self._of[path], self._session
        repo, commit = str(source.repo), str(source.commit)
        name = f"{source.subfolder}/{path.name}" if source.subfolder else path.name
        with explained(HubRef(repo, commit, source.subfolder), source.name):
            if source not in self._hashes:
                self._hashes[source] = hashes_of(repo, commit, session.token)
            session.notify(f"downloading {path.name}")
            place = self._top or session.place(repo, commit)
            download(repo, name, commit, session.token, place, self._hashes[source].get(name, ""))


def bring_weights(checkpoint: Checkpoint, session: Session, files: Collection[Path] | None = None) -> None:
    """Download the weights of a checkpoint, or some of its files, as far as they are not on this machine."""
    source = checkpoint.source
    wanted = [
        shard.filename
        for shard in checkpoint.shards
        if files is None or any(tensor.path in files for tensor in shard.tensors)
    ]
    if not checkpoint.is_here:
        with explained(HubRef(str(source.repo), source.commit, source.subfolder), source.name):
            download_all(source, wanted, session)


def expect(checkpoints: Iterable[Checkpoint], needs: Needs, session: Session) -> Prefetch | None:
    """What some work on checkpoints reads of the Hub; None where all weights are here.

    With the cache, what it needs is downloaded at once. Else a file arrives when it is first read, and goes after the
    last piece of work that needs it.
    """
    far = [checkpoint for checkpoint in checkpoints if not checkpoint.is_here]
    theirs = {tensor.path for checkpoint in far for tensor in checkpoint.tensors.values()}
    # never a file that was here before: what arrives is removed
    coming = {work: tuple(path for path in paths if path in theirs) for work, paths in needs.items()}
    here: set[Path] = set()
    if session.cache:
        here = {path for paths in coming.values() for path in paths}
        for checkpoint in far:
            bring_weights(checkpoint, session, here)
    return Prefetch(coming, WeightDownload(far, session), keep=session.cache, here=here) if far else None


@contextmanager
def reading(checkpoints: Iterable[Checkpoint], needs: Needs, session: Session) -> Iterator[Reader]:
    """A reader for some work on checkpoints, as `expect` has it."""
    with ExitStack() as stack:
        if arrivals := expect(checkpoints, needs, session):
            stack.enter_context(without_bars())
            stack.callback(arrivals.close)
        yield stack.enter_context(closing(arrivals.reader() if arrivals else Reader()))
