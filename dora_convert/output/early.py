"""Begin a new output while torch is imported: allocate its shards, and copy and hash what no adapter touches.

Importing torch keeps one processor busy for most of a second. None of this work needs arithmetic, and system calls
and hashes leave the interpreter to the import. Nothing counts as done until the run enters it in its journal.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import xxhash

from ..plan.plan import Plan
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .finished import FinishedLine, TensorResult, copied_name
from .shards import ShardFiles

SYNCED_BYTES = 1 << 25
"""Bytes that are synced at a time."""
HASHED_BYTES = 1 << 23
"""Bytes that are hashed at a time: for each piece, this thread waits until the import lends it the interpreter."""
LEAST_HASHED = 1 << 20
"""Smaller tensors are left to the run."""
AHEAD_BYTES = 1 << 30
"""The most bytes of the base that the system is asked to read ahead."""
AHEAD_STEP = 1 << 23
"""Linux reads no more ahead for one request."""


class HeadStart:
    """The shards of a new output, and the thread that begins to fill them."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Create the shards in a folder, and start the thread."""
        self.shards = ShardFiles(folder, plan, create=True, cached=False)
        self._plan, self._reader = plan, Reader()
        self._lines: list[FinishedLine] = []
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="early", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after the piece that it is at; the shards stay open."""
        self._stopped.set()
        self._thread.join()

    def discard(self) -> None:
        """Stop, and close the shards."""
        self.stop()
        self.shards.close()

    def finish(self) -> Sequence[FinishedLine]:
        """Stop, and return the lines of what is done, whose bytes may not be synced; raise the error of the thread."""
        self.stop()
        if self._error:
            raise self._error
        return self._lines

    def _run(self) -> None:
        try:
            with closing(self._reader):
                for _ in self._work():
                    if self._stopped.is_set():
                        return
        except BaseException as error:  # noqa: BLE001 - raised again by `finish`
            self._error = error

    def _work(self) -> Iterator[None]:
        """Do one piece after another."""
        unsynced = 0
        for copy in self.shards.copies(self._plan):
            self.shards.copy(copy, self._reader)
            self._lines.append(FinishedLine(copied=copy[2:]))
            yield
            if (unsynced := unsynced + copy.length) >= SYNCED_BYTES:
                self.shards.sync(self.shards.path(copy.shard))  # the disk has nothing else to do
                unsynced = 0
                yield
        for item in self._plan.items:
            if item.verbatim and item.nbytes >= LEAST_HASHED and not item.source.is_view:
                yield from self._hash(copied_name(item), item.source)
        yield from self._read_ahead()

    def _hash(self, name: str, tensor: StoredTensor) -> Iterator[None]:
        """Hash a copied tensor of the base."""
        digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(HASHED_BYTES, tensor.nbytes)))
        for done in range(0, tensor.nbytes, HASHED_BYTES):
            piece = buffer[: tensor.nbytes - done]
            self._reader.read(tensor.path, tensor.start + done, piece)
            digest.update(piece)
            yield
        self._lines.append(FinishedLine(name, TensorResult(digest.hexdigest(), digest.hexdigest(), None)))

    def _read_ahead(self) -> Iterator[None]:
        """Ask the system to read what the run reads first: free if the base is in memory already."""
        left = AHEAD_BYTES if hasattr(os, "posix_fadvise") else 0
        for item in self._plan.items:
            tensor = item.source
            if item.verbatim or tensor.coded or tensor.is_view:
                continue
            with self._reader.using(tensor.path) as descriptor:
                for done in range(0, min(tensor.nbytes, left), AHEAD_STEP):
                    length = min(AHEAD_STEP, tensor.nbytes - done)
                    os.posix_fadvise(descriptor, tensor.start + done, length, os.POSIX_FADV_WILLNEED)
                    left -= length
                    yield
