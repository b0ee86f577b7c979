"""Read tensors of files that stay in an object store, by ranges."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import MalformedError
from ..storage.reader import FileSupply, Reader
from .object_store import ObjectStore

StoredNames = Mapping[Path, tuple[ObjectStore, str]]
"""The store and the name in it of each file, by the path that stored tensors have."""
WINDOW = 4 << 20
"""Bytes that a thread reads at least where it reads on: a request takes as long as reading some megabytes."""


class RangeReader(Reader):
    """A reader of local files, and of files in stores."""

    def __init__(self, names: StoredNames, supply: FileSupply | None = None) -> None:
        """`names` are the files that stay in stores; `supply` limits the outputs' number."""
        super().__init__(supply)
        self._names, self._limits = names, supply
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
        store, name = self._names[path]
        found = [self._one(path, spans[0])] if len(spans) == 1 else store.read(name, spans)
        for span, data in zip(spans, found, strict=True):
            if len(data) != len(span):
                raise MalformedError(f"{store.url}/{name} became shorter while it was read.")
            rest[: len(data)] = data
            rest = rest[len(data) :]

    def _one(self, path: Path, span: range) -> bytes | memoryview:
        """Return a range, from the last answer if it is there; ask for more than the range if the thread reads on."""
        before, start, data = getattr(self._last, "answer", (None, 0, b""))
        if before == path and start <= span.start and span.stop <= start + len(data):
            return memoryview(data)[span.start - start : span.stop - start]
        goes_on = before == path and span.start == getattr(self._last, "stop", None)
        stop = max(span.stop, span.start + WINDOW) if goes_on else span.stop
        store, name = self._names[path]
        data = store.read(name, [range(span.start, stop)])[0]
        self._last.answer, self._last.stop = (path, span.start, data), span.start + len(data)
        return memoryview(data)[: len(span)]
