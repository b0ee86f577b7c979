"""Hashes: of bytes as they pass, of files, of stored tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import xxhash

from .reader import Reader
from .safetensors import StoredTensor

CHUNK_BYTES = 1 << 20


class Digest:
    """xxh3-128 of bytes as they pass, and sha256 where a proof is asked for."""

    def __init__(self, *, proof: bool) -> None:
        self._fast, self._proof = xxhash.xxh3_128(), hashlib.sha256() if proof else None

    def update(self, data: memoryview) -> None:
        """The next bytes."""
        self._fast.update(data)
        if self._proof:
            self._proof.update(data)

    @property
    def fast(self) -> str:
        """xxh3-128."""
        return self._fast.hexdigest()

    @property
    def proof(self) -> str | None:
        """sha256, where it was asked for."""
        return self._proof.hexdigest() if self._proof else None


def xxh3(path: Path) -> str:
    """The xxh3-128 of a file."""
    return hash_of(xxhash.xxh3_128(), path)


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    return hash_of(hashlib.sha256(), path)


def hash_of(digest: Any, source: Path | bytes) -> str:
    """A file's bytes, or some, through a hash that may have begun."""
    if isinstance(source, bytes):
        digest.update(source)
    else:
        with source.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return str(digest.hexdigest())


def stored_digest(tensor: StoredTensor, reader: Reader, *, proof: bool = False) -> Digest:
    """The hashes of a stored tensor's bytes."""
    digest, buffer = Digest(proof=proof), memoryview(bytearray(min(CHUNK_BYTES, tensor.nbytes)))
    for start in range(0, tensor.nbytes, CHUNK_BYTES):
        chunk = buffer[: tensor.nbytes - start]
        reader.read(tensor.path, tensor.start + start, chunk)
        digest.update(chunk)
    return digest
