"""Positional reads of tensors on disk, from any thread; of files that may still be on their way."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from pathlib import Path
from typing import Protocol

from ..errors import MalformedError
from .safetensors import CHUNK, StoredTensor


class FileSupply(Protocol):
    """Files on their way."""

    def need(self, path: Path) -> None:
        """Return once a file is here."""

    def done(self, output: str) -> None:
        """A piece of work is done; files that no other needs may go."""

    def close(self) -> None:
        """Nothing more is needed."""


class Reader:
    """Positional reads from any thread; files are opened once and stay open until `close`.

    Files need not be here from the beginning: where there are `supply`, those bring and remove them.
    """

    def __init__(self, supply: FileSupply | None = None) -> None:
        self._supply = supply
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popitem()[1])

    def forget(self, path: Path) -> None:
        """Close a file that is not read any more."""
        with self._lock:
            if path in self._files:
                os.close(self._files.pop(path))

    def done(self, work: str) -> None:
        """A piece of work reads nothing any more."""
        if self._supply:
            self._supply.done(work)

    def stop(self) -> None:
        """Wake everybody who waits for a file: the run has failed."""
        if self._supply:
            self._supply.close()

    def same_bytes(self, one: StoredTensor, other: StoredTensor) -> bool:
        """Whether two tensors have the same dtype, shape and contents."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        mine, theirs = (memoryview(bytearray(min(CHUNK, one.nbytes))) for _ in range(2))
        for start in range(0, one.nbytes, CHUNK):
            size = min(CHUNK, one.nbytes - start)
            self.read(one.path, one.start + start, mine[:size])
            self.read(other.path, other.start + start, theirs[:size])
            if mine[:size] != theirs[:size]:
                return False
        return True

    def descriptor(self, path: Path) -> int:
        """The open file descriptor of a path."""
        if self._supply and path not in self._files:
            self._supply.need(path)
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            return self._files[path]

    def read(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from `offset`; MalformedError when the file ends first."""
        done = 0
        while done < len(buffer):
            try:
                got = self._read_some(self.descriptor(path), buffer[done:], offset + done)
            except OSError as error:
                raise MalformedError(f"{path} cannot be read: {error.strerror}.") from error
            if got == 0:
                raise MalformedError(f"{path} became shorter while it was read.")
            done += got

    if hasattr(os, "preadv"):

        @staticmethod
        def _read_some(descriptor: int, buffer: memoryview, offset: int) -> int:
            return os.preadv(descriptor, [buffer], offset)

    else:  # Windows has no positional read

        def _read_some(self, descriptor: int, buffer: memoryview, offset: int) -> int:  # type: ignore[misc]
            with self._lock:
                os.lseek(descriptor, offset, os.SEEK_SET)
                data = os.read(descriptor, len(buffer))
            buffer[: len(data)] = data
            return len(data)


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors on this machine have the same dtype, shape and contents; reads both."""
    with closing(Reader()) as reader:
        return reader.same_bytes(one, other)
