"""The base's weight files on their way here, each before it is first read, the next one while one is merged.

Where they are not to stay, they are counted: an input that is here or arriving takes a place, and so does an output from
its first tensor until it is on the Hub. With three places the next input arrives while one shard is merged, or one
output is uploaded while the next is made, and the disk never holds more than three shards.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

from ..checkpoint import Checkpoint
from ..errors import HubError
from ..plan import Plan
from ..refs import HubRef
from .answers import explained
from .fetch import download_all

PLACES = 3


class Arrivals:
    """What is here of the inputs of a plan; called from workers."""

    def __init__(
        self,
        plan: Plan,
        bring: Callable[[Path], None] | None,
        *,
        keep: bool,
        places: int | None,
        outputs: bool,
    ) -> None:
        """`bring` downloads a file, None where all are here; without `keep` files are removed after their last use.

        `places` bounds what is on the disk, None does not; with `outputs` those take places, too.
        """
        self._bring, self._keep = bring, keep
        self._outputs = _needs(plan)
        self._users = {
            path: {name for name, needs in self._outputs.items() if path in needs} for path in self.inputs
        }
        most = max((len(needs) for needs in self._outputs.values()), default=1)
        self._free = float("inf") if places is None else max(places, most + 2)
        self._begins = Counter(next(iter(needs)) for needs in self._outputs.values() if needs and outputs)
        self._begun: set[Path] = set()
        self._here: set[Path] = set() if bring else set(self.inputs)
        self._asked: set[Path] = set()
        self._queue: deque[Path] = deque()
        self._forget: Callable[[Path], None] = lambda _: None
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        if bring:
            threading.Thread(target=self._work, name="download", daemon=True).start()

    @property
    def inputs(self) -> list[Path]:
        """The base's files, in the order in which they are needed."""
        return list(dict.fromkeys(path for needs in self._outputs.values() for path in needs))

    def attach(self, forget: Callable[[Path], None]) -> None:
        """`forget` closes a file that is about to be removed."""
        self._forget = forget

    def need(self, path: Path) -> None:
        """Wait until a file is here, and until there is a place for what is made of it; raises what went wrong."""
        with self._changed:
            if path not in self._users:
                return
            self._ask(path)
            self._wait(lambda: path in self._here)
            outputs = self._begins[path]
            self._wait(lambda: path in self._begun or self._free >= outputs)
            if path not in self._begun:
                self._begun.add(path)
                self._free -= outputs
                self._ask_next(path)

    def done(self, output: str) -> None:
        """An output is made: inputs that nothing else needs go."""
        with self._changed:
            for path in self._outputs[output]:
                self._users[path].discard(output)
                if not self._users[path] and path in self._here and self._bring and not self._keep:
                    self._here.discard(path)
                    self._asked.discard(path)
                    self._forget(path)
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
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _ask(self, path: Path) -> None:
        if path not in self._here and path not in self._asked:
            self._asked.add(path)
            self._queue.append(path)
            self._changed.notify_all()

    def _ask_next(self, path: Path) -> None:
        later = self.inputs[self.inputs.index(path) + 1 :]
        if following := next((other for other in later if self._users[other]), None):
            self._ask(following)

    def _wait(self, ready: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._closed or self._error or ready())
        if self._error:
            raise self._error
        if not ready():
            raise HubError("The merge was stopped while it waited for its input.")

    def _work(self) -> None:
        while (path := self._take()) is not None:
            try:
                assert self._bring
                self._bring(path)
            except BaseException as error:  # noqa: BLE001 - raised again where the file is needed
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._here.add(path)
                self._changed.notify_all()

    def _take(self) -> Path | None:
        """The next file to bring, once there is a place for it; None when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._queue and (self._keep or self._free >= 1)))
            if self._closed:
                return None
            if not self._keep:
                self._free -= 1
            return self._queue.popleft()


def _needs(plan: Plan) -> dict[str, dict[Path, None]]:
    """For each output shard the files of the base that it is made of."""
    base = {tensor.path for tensor in plan.base.tensors.values()}
    found = {
        shard.filename: dict.fromkeys(path for path in shard.inputs if path in base) for shard in plan.shards
    }
    for tensor in plan.lost:
        found[plan.lost_with[tensor.name]].setdefault(tensor.path)
    return found


def bring_weights(checkpoint: Checkpoint, token: str | None) -> None:
    """Download the weights of a checkpoint into the cache, as far as they are not on this machine."""
    source = checkpoint.source
    if absent(checkpoint):
        with explained(HubRef(str(source.repo), source.commit, source.subfolder), source.name):
            download_all(source, [shard.filename for shard in checkpoint.shards], token)


def absent(base: Checkpoint) -> bool:
    """Whether weights of a checkpoint are not on this machine."""
    return not all(path.is_file() for path in {tensor.path for tensor in base.tensors.values()})
