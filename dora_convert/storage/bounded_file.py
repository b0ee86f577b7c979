"""Read a file in parts of a limited size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..errors import MalformedError


class BoundedFile(io.FileIO):
    """A file that is never read by more than so many bytes at once: zipfile reads a list of records as a whole."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(path)
        self._most = most

    def read(self, size: int | None = -1, /) -> bytes | Any:
        """Return the next bytes."""
        whole = size is None or size < 0
        data = super().read(self._most + 1 if whole else min(size or 0, self._most + 1))
        if data and len(data) > self._most:
            raise MalformedError(f"{self.name} has a part that is too long: at most {self._most} bytes are read.")
        return data
