"""Read tensors of files that stay in an object store, by ranges."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import MalformedError
from ..storage.reader import FileSupply, Reader
from .object_store import ObjectStore

WINDOW = 4 << 20
"""Bytes that a thread reads at least where it reads on: a request takes as long as reading some megabytes."""


class RangeReader(Reader):
    """A reader of local files, and of files in a store."""

    def __init__(self, store: ObjectStore, names: Mapping[Path, str], supply: FileSupply | None = None) -> None:
        """`names` are the store's files by the paths that stored tensors have; `supply` limits the outputs' number."""
        super().__init__(supply)
        self._store, self._names, self._limits = store, names, supply
        self._last = threading.local()

    def is_remote(self, path: Path) -> bool:
        """Return True if a file stays in the store."""
        return path in self._names

    def gather(self, path: Path, runs: Iterable[tuple[int, int]], buffer: memoryview | bytearray) -> None:
        """Fill the buffer with runs of bytes, each given by (offset, length), one after the other."""
        if path not in self._names:
            super().gather(path, runs, buffer)
            return
        if self._limits:
            self._limits.need(path)
        spans, rest = [range(start, start + length) for start, length in runs if length], memoryview(buffer)
        found = [self._one(path, spans[0])] if len(spans) == 1 else self._store.read(self._names[path], spans)
        for span, data in zip(spans, found, strict=True):
            if len(data) != len(span):
                raise MalformedError(f"{self._store.url}/{self._names[path]} became shorter while it was read.")
            rest[: len(data)] = data
            rest = rest[len(data) :]

    def _one(self, path: Path, span: range) -> bytes | memoryview:
        """Return a range, from the last answer if it is there; ask for more than the range if the thread reads on."""
        before, start, data = getattr(self._last, "answer", (None, 0, b""))
        if before == path and start <= span.start and span.stop <= start + len(data):
            return memoryview(data)[span.start - start : span.stop - start]
        goes_on = before == path and span.start == getattr(self._last, "stop", None)
        stop = max(span.stop, span.start + WINDOW) if goes_on else span.stop
        data = self._store.read(self._names[path], [range(span.start, stop)])[0]
        self._last.answer, self._last.stop = (path, span.start, data), span.start + len(data)
        return memoryview(data)[: len(span)]
