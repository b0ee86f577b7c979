"""Tensors that are kept on disk between two models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..engine.host_memory import as_bytes, empty
from ..errors import OutputError


class Kept:
    """float32 tensors by name, in files of a folder; OutputError where that cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {}
        folder.mkdir()

    def __setitem__(self, name: str, value: Tensor) -> None:
        value = value.float().contiguous()
        self._shapes[name] = tuple(value.shape)
        try:
            (self._folder / name).write_bytes(as_bytes(value))
        except OSError as error:
            raise OutputError(
                f"{self._folder} cannot be written: {error.strerror or error}.",
                hint="TMPDIR=FOLDER names another place for what a model says",
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        value = empty(self._shapes[name], torch.float32)
        with (self._folder / name).open("rb") as file:
            file.readinto(as_bytes(value))
        return value
