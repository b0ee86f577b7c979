"""Keep the undo record of a task until it goes to the driver: in memory if it is small, else in a file of the node."""

from __future__ import annotations

import io
import mmap
from collections.abc import Callable
from pathlib import Path
from pickle import PickleBuffer
from tempfile import TemporaryFile
from typing import IO, Any

from ..sources import Session
from ..storage.spool import Segment, Spool

KEPT_BYTES = 16 << 20
"""Bytes of a record that a process keeps in memory. More go to a file, which has no name and ends with the process."""


class SentBytes:
    """Bytes of a task's record; pickling passes them on without another copy in memory."""

    def __init__(self, data: Any = b"") -> None:
        """Take what has a buffer: bytes, a map of a file, or what pickle has carried."""
        self.data = memoryview(data)

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[[Any], SentBytes], tuple[Any]]:
        """Pickle the bytes beside the pickle, where the protocol has that."""
        return SentBytes, (PickleBuffer(self.data) if protocol >= 5 else bytes(self.data),)


class NodeSpool(Spool):
    """A spool whose bytes go to another machine. One thread adds to it."""

    path = Path()

    def __init__(self, session: Session) -> None:
        """Have `session` hold the file of a record that is too long for memory."""
        self._session = session
        self._begin()

    def _begin(self) -> None:
        self._record: IO[bytes] = io.BytesIO()
        self._length = 0

    def add(self, data: bytes | memoryview) -> Segment:
        """Append bytes; return the segment that holds them."""
        segment = Segment(self._length, len(data))
        self._length += len(data)
        if self._length > KEPT_BYTES and isinstance(self._record, io.BytesIO):
            self._record = self._moved(self._record)
        self._record.write(data)
        return segment

    def _moved(self, record: io.BytesIO) -> IO[bytes]:
        """Return a file of this node with the bytes that were in memory."""
        folder = self._session.temporary("records")
        folder.mkdir(exist_ok=True)
        file = TemporaryFile(dir=folder)  # noqa: SIM115
        file.write(record.getbuffer())
        return file

    def taken(self) -> SentBytes:
        """Return all bytes, and forget them."""
        record, length = self._record, self._length
        self._begin()
        if isinstance(record, io.BytesIO):
            return SentBytes(record.getvalue())
        with record:
            record.flush()
            return SentBytes(mmap.mmap(record.fileno(), length, access=mmap.ACCESS_READ))

    def close(self) -> None:
        """Give back what no task has taken."""
        self._record.close()
