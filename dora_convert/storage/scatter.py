"""Read many places of files into many buffers, with few calls of the system: each costs more than some kilobytes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path

from ..errors import MalformedError
from .reader import Reader
from .safetensors import StoredTensor, unreadable

Place = tuple[int, memoryview]
"""An offset in a file, and the buffer for as many bytes from there."""
NEAR_BYTES = 1 << 13
"""So many bytes between two places are read along, and forgotten."""
MOST_BUFFERS = 1000
"""Linux takes 1,024 buffers in a call."""
_FORGOTTEN = memoryview(bytearray(NEAR_BYTES))


def fill(reader: Reader, places: Iterable[tuple[Path, Iterable[Place]]]) -> None:
    """Fill buffers, each from an offset of a file; raise MalformedError for a file that ends first."""
    of_file = defaultdict[Path, list[Place]](list)
    for path, some in places:
        of_file[path] += some
    for path, mine in of_file.items():
        mine.sort(key=itemgetter(0))
        if reader.is_remote(path) or not hasattr(os, "preadv"):
            _fill_copies(reader, path, mine)
        else:
            _fill_at_once(reader, path, mine)


def whole(tensors: Sequence[StoredTensor], data: memoryview) -> Iterator[tuple[Path, list[Place]]]:
    """Yield the places of whole tensors of one size, for `fill`: neighbours in a file are one place.

    The buffer gets their bytes, one tensor after the other.
    """
    size, first = len(data) // len(tensors), 0
    path, start = tensors[0].path, tensors[0].start
    for k, tensor in enumerate(tensors):
        if tensor.start != start + (k - first) * size or tensor.path != path:
            yield path, [(start, data[first * size : k * size])]
            first, path, start = k, tensor.path, tensor.start
    yield path, [(start, data[first * size :])]


def _fill_copies(reader: Reader, path: Path, places: list[Place]) -> None:
    """Fill buffers from one answer, which joins places that are neighbours."""
    runs = list(_runs(places, near=0))
    rest = memoryview(bytearray(sum(length for _, length, _ in runs)))
    reader.gather(path, [(start, length) for start, length, _ in runs], rest)
    for _, buffer in places:
        buffer[:] = rest[: len(buffer)]
        rest = rest[len(buffer) :]


def _fill_at_once(reader: Reader, path: Path, places: list[Place]) -> None:
    """Fill buffers of one file, those of places that are near each other with one call."""
    try:
        with reader.using(path) as descriptor:
            for start, length, buffers in _runs(places, NEAR_BYTES):
                if os.preadv(descriptor, buffers, start) < length:
                    _fill_slowly(descriptor, path, start, buffers)
    except OSError as error:
        raise unreadable(path, error) from error


def _fill_slowly(descriptor: int, path: Path, start: int, buffers: list[memoryview]) -> None:
    """Fill buffers one by one: the system may give less than was asked for."""
    for buffer in buffers:
        rest = buffer
        while len(rest):
            if not (done := os.preadv(descriptor, [rest], start)):
                raise MalformedError(f"{path} became shorter while it was read.")
            rest, start = rest[done:], start + done


def _runs(places: Iterable[Place], near: int) -> Iterator[tuple[int, int, list[memoryview]]]:
    """Yield the start and the length of each run of near places, and the buffers for all of its bytes."""
    start = end = -1
    buffers: list[memoryview] = []
    for offset, buffer in places:
        gap = offset - end
        if not buffers or not 0 <= gap <= near or len(buffers) >= MOST_BUFFERS:
            if buffers:
                yield start, end - start, buffers
            start, buffers = offset, []
        elif gap:
            buffers.append(_FORGOTTEN[:gap])
        buffers.append(buffer)
        end = offset + len(buffer)
    if buffers:
        yield start, end - start, buffers
