"""Tensors that are kept on disk between two models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .memory import as_bytes, empty


class Kept:
    """float32 tensors by name, in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {}
        folder.mkdir()

    def __setitem__(self, name: str, value: Tensor) -> None:
        value = value.float().contiguous()
        self._shapes[name] = tuple(value.shape)
        (self._folder / name).write_bytes(as_bytes(value))

    def __getitem__(self, name: str) -> Tensor:
        value = empty(self._shapes[name], torch.float32)
        with (self._folder / name).open("rb") as file:
            file.readinto(as_bytes(value))
        return value
