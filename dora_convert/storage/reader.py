"""Read stored tensors and files by position, in pieces or blocks of rows, and hash them; from any thread."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import xxhash

from ..errors import MalformedError
from .safetensors import StoredTensor, unreadable

PIECE_BYTES = 1 << 20
"""Bytes that are read at a time where a tensor or a file is read whole."""
BLOCK_ELEMENTS = 1 << 19
"""4 MiB in float64: two workers' blocks stay in a processor's cache; double size takes 1.5 times as long.

Blocks depend on shapes alone: an output's bytes must not depend on the memory budget or on the number of workers.
"""
ROWS_MULTIPLE = 16
MOST_OPEN = 64
SHARE = 4
"""One pool takes this part of the files that the process may open; a run has up to three pools."""


@dataclass
class _OpenFile:
    descriptor: int
    lock: threading.Lock
    users: int = 0

    def __enter__(self) -> int:
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1


class OpenFiles:
    """A pool of open files: a file is opened for its first user, and the longest unused one is closed first."""

    def __init__(self, flags: int = os.O_RDONLY) -> None:
        self._flags = flags | getattr(os, "O_BINARY", 0)
        self._lock = threading.Lock()
        self._files: dict[Path, _OpenFile] = {}
        self._most = _most_open()

    def using(self, path: Path) -> _OpenFile:
        """Lend a file's descriptor, which stays open until the end of the block; a context manager."""
        with self._lock:
            file = self._files.pop(path, None) or _OpenFile(os.open(path, self._flags), self._lock)
            self._files[path] = file  # as the latest
            file.users += 1
            self._close_unused()
        return file

    def _close_unused(self) -> None:
        """Close the longest unused files until the rest are few enough."""
        if (excess := len(self._files) - self._most) <= 0:
            return
        for path in [path for path, file in self._files.items() if not file.users][:excess]:
            os.close(self._files.pop(path).descriptor)

    def forget(self, path: Path) -> None:
        """Close a file that is not used any more."""
        with self._lock:
            if path in self._files:
                os.close(self._files.pop(path).descriptor)

    def __contains__(self, path: Path) -> bool:
        return path in self._files

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popitem()[1].descriptor)


def _most_open() -> int:
    """Return the number of files that one pool keeps open."""
    try:
        import resource
    except ImportError:  # Windows
        return MOST_OPEN
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN if allowed == resource.RLIM_INFINITY else min(MOST_OPEN, allowed // SHARE)


class FileSupply(Protocol):
    """Files that are downloaded while they are read."""

    def need(self, path: Path) -> None:
        """Return once a file is on this machine."""

    def done(self, output: str) -> None:
        """Note that a piece of work is done; files that no other work needs may be removed."""

    def close(self) -> None:
        """Stop: nothing more is needed."""


class Reader:
    """Positional reads from any thread; `supply` downloads and removes files that may still be on their way."""

    def __init__(self, supply: FileSupply | None = None) -> None:
        self._supply, self._files = supply, OpenFiles()
        self.close, self.forget = self._files.close, self._files.forget

    def done(self, work: str) -> None:
        """Note that a piece of work reads nothing any more."""
        if self._supply:
            self._supply.done(work)

    def stop(self) -> None:
        """Wake every thread that waits for a file: the run has failed."""
        if self._supply:
            self._supply.close()

    def is_remote(self, path: Path) -> bool:  # noqa: ARG002 - for readers of object stores
        """Return True if a file stays in an object store, so that it has no descriptor."""
        return False

    def using(self, path: Path) -> AbstractContextManager[int]:
        """Lend the descriptor of a file, once the file is on this machine."""
        if self._supply and path not in self._files:
            self._supply.need(path)
        return self._files.using(path)

    def read(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from `offset`; raise MalformedError if the file ends first."""
        self.gather(path, [(offset, len(buffer))], buffer)

    def gather(self, path: Path, runs: Iterable[tuple[int, int]], buffer: memoryview | bytearray) -> None:
        """Fill the buffer with runs of bytes, each given by (offset, length), one after the other."""
        rest = memoryview(buffer)
        try:
            with self.using(path) as descriptor:
                for start, length in runs:
                    done = 0
                    while done < length:
                        if not (count := self._read_some(descriptor, rest[: length - done], start + done)):
                            raise MalformedError(f"{path} became shorter while it was read.")
                        rest, done = rest[count:], done + count
        except OSError as error:
            raise unreadable(path, error) from error

    def pieces(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """Yield a tensor's bytes, a megabyte at a time; each piece overwrites the one before."""
        if tensor.is_view:
            return self._pieces_of_view(tensor)
        return self.span(tensor.path, tensor.start, tensor.nbytes)

    def _pieces_of_view(self, tensor: StoredTensor) -> Iterator[memoryview]:
        from .stored_view import lines_of, run_of, whole_of

        if run := run_of(tensor):
            return self.span(tensor.path, *run)
        whole = whole_of(tensor)
        data = memoryview(bytearray(whole.nbytes))
        self.read(whole.path, whole.start, data)
        return self._in_pieces(lines_of(tensor, data))

    @staticmethod
    def _in_pieces(lines: Iterator[memoryview]) -> Iterator[memoryview]:
        """Yield the bytes of lines in pieces of the usual size."""
        pending = bytearray()
        for line in lines:
            pending += line
            while len(pending) >= PIECE_BYTES:
                yield memoryview(bytes(pending[:PIECE_BYTES]))
                del pending[:PIECE_BYTES]
        if pending:
            yield memoryview(bytes(pending))

    def span(self, path: Path, start: int, length: int) -> Iterator[memoryview]:
        """Yield a range of a file's bytes, as `pieces` does."""
        buffer = memoryview(bytearray(min(PIECE_BYTES, length)))
        for done in range(0, length, PIECE_BYTES):
            piece = buffer[: length - done]
            self.read(path, start + done, piece)
            yield piece

    def digest(self, tensor: StoredTensor, *, proof: bool = False) -> Digest:
        """Return the hashes of a tensor's bytes; sha256 with `proof`."""
        digest = Digest(proof=proof)
        for piece in self.pieces(tensor):
            digest.update(piece)
        return digest

    def same_bytes(self, one: StoredTensor, other: StoredTensor) -> bool:
        """Return True if two tensors have the same dtype, shape and contents."""
        alike = (one.dtype, one.shape, one.coded) == (other.dtype, other.shape, other.coded)
        mine = map(bytearray, self.pieces(one))  # two memoryviews would compare byte by byte
        return alike and all(piece == theirs for piece, theirs in zip(mine, self.pieces(other), strict=True))

    if hasattr(os, "preadv"):

        @staticmethod
        def _read_some(descriptor: int, buffer: memoryview, offset: int) -> int:
            return os.preadv(descriptor, [buffer], offset)

    else:  # Windows has no positional read
        _seeking = threading.Lock()

        def _read_some(self, descriptor: int, buffer: memoryview, offset: int) -> int:  # type: ignore[misc]
            with self._seeking:
                os.lseek(descriptor, offset, os.SEEK_SET)
                data = os.read(descriptor, len(buffer))
            buffer[: len(data)] = data
            return len(data)


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Return True if two tensors on this machine have the same dtype, shape and contents; reads both."""
    with closing(Reader()) as reader:
        return reader.same_bytes(one, other)


def same_contents(path: Path, other: Path | bytes) -> bool:
    """Return True if a file holds some bytes, or the bytes of another file."""
    if isinstance(other, bytes):
        return path.stat().st_size == len(other) and path.read_bytes() == other
    if path.stat().st_size != other.stat().st_size:
        return False
    with path.open("rb") as one, other.open("rb") as two:
        return all(piece == two.read(PIECE_BYTES) for piece in iter(partial(one.read, PIECE_BYTES), b""))


def read_whole(tensor: StoredTensor) -> bytes:
    """Return the bytes of a small tensor on this machine."""
    with closing(Reader()) as reader:
        return b"".join(map(bytes, reader.pieces(tensor)))


class Digest:
    """The xxh3-128 of bytes as they pass, and their sha256 where a proof is asked for."""

    def __init__(self, *, proof: bool) -> None:
        self._fast, self._proof = xxhash.xxh3_128(), hashlib.sha256() if proof else None

    def update(self, data: bytes | memoryview) -> None:
        """Hash the next bytes."""
        self._fast.update(data)
        if self._proof:
            self._proof.update(data)

    @property
    def fast(self) -> str:
        """xxh3-128."""
        return self._fast.hexdigest()

    @property
    def proof(self) -> str | None:
        """sha256, where a proof was asked for."""
        return self._proof.hexdigest() if self._proof else None


def xxh3(path: Path) -> str:
    """Return the xxh3-128 of a file."""
    return hash_of(xxhash.xxh3_128(), path)


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    return hash_of(hashlib.sha256(), path)


def hash_of(digest: Any, source: Path | bytes) -> str:
    """Return a hash, which may have begun, of a file or of some bytes."""
    if isinstance(source, bytes):
        digest.update(source)
    else:
        with source.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
    return str(digest.hexdigest())


def block_height(rows: int, columns: int, step: int = ROWS_MULTIPLE, elements: int = 0) -> int:
    """Return the rows of a block: half a million elements or so many, a multiple of 16 rows or `step`, at most all."""
    fitting = (elements or BLOCK_ELEMENTS) // max(1, columns)
    return max(1, min(rows, max(step, fitting - fitting % step)))


def spans(
    rows: int, columns: int, parts: int = 1, step: int = ROWS_MULTIPLE, elements: int = 0
) -> Iterator[tuple[int, int]]:
    """Yield a matrix's blocks as half-open ranges of rows; each of `parts` equal parts has its own blocks."""
    whole, height = rows // parts, block_height(rows // parts, columns, step, elements)
    for first in range(0, rows, whole or 1):
        for start in range(first, first + whole, height):
            yield start, min(start + height, first + whole)
