"""Show a format the files of a REF: their names, and headers and JSON as soon as a format asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import DoraConvertError, RefError
from .filenames import GGUF, PICKLES
from .json_files import read_json
from .safetensors import Header, StoredTensor

CONFIG = "adapter_config.json"
WRAPPERS = ("model_state_dict", "model", "state_dict")
"""Keys under which training scripts put a dict of tensors."""
LITGPT = ".pth.lora"
NUMPY = ".npz"
READ = (".safetensors", *PICKLES, LITGPT, NUMPY)
"""Ends of the weight files whose headers are read."""
FEW = 5
"""So many weight files of a folder are opened to recognise a format."""
MODEL_FILES = ("config.json", "model_index.json")
"""Files that a model's folder has, and an adapter's folder without a config of its own has not."""


class FileView:
    """The files at the top of a folder, or a single file; a listing without a path has names alone."""

    def __init__(self, names: Sequence[str], folder: Path | None = None, *, lone: bool = False) -> None:
        """`lone` means that a single file was named; its neighbours do not count, a config beside it does."""
        self.names, self.folder, self.lone = tuple(sorted(names)), folder, lone
        self._headers: dict[str, Header | None] = {}
        self._json: dict[str, dict[str, Any]] = {}

    @classmethod
    def of(cls, where: Path | Sequence[str]) -> FileView:
        """Return the view of a local path, or of the names in a remote folder."""
        if not isinstance(where, Path):
            return cls([name for name in where if "/" not in name])
        if where.is_dir():
            return cls([entry.name for entry in where.iterdir()], where)
        return cls([where.name], where.parent, lone=True)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, StoredTensor]) -> FileView:
        """Return the view of one weight file whose header is known."""
        view = cls(["weights.safetensors"], Path())
        view._headers["weights.safetensors"] = Header(tensors, {})
        return view

    def path(self, name: str) -> Path:
        """Return the path of a file."""
        return (self.folder or Path()) / name

    def has(self, name: str) -> bool:
        """Return True if a file exists; beside a single file, too."""
        return name in self.names or bool(self.lone and self.folder and (self.folder / name).is_file())

    def json(self, name: str) -> Mapping[str, Any]:
        """Return a JSON object; empty if the file does not exist or cannot be read."""
        if name not in self._json:
            self._json[name] = _read(lambda: read_json(self.path(name))) or {} if self.folder else {}
        return self._json[name]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of adapter_config.json."""
        return self.json(CONFIG) if self.has(CONFIG) else {}

    @property
    def weights(self) -> list[str]:
        """The weight files whose headers are read."""
        return [name for name in self.names if name.endswith(READ)]

    @property
    def candidates(self) -> list[str]:
        """The weight files that may be an adapter's by their tensors: none in a model's folder, few in any."""
        return [] if not self.folder or any(map(self.names.__contains__, MODEL_FILES)) else self.weights[:FEW]

    def header(self, name: str) -> Header | None:
        """Return the header of a weight file; None if it cannot be read."""
        if name not in self._headers:
            self._headers[name] = _read(lambda: read_any(self.path(name))) if self.folder else None
        return self._headers[name]

    def need(self, name: str) -> Header:
        """Return the header of a weight file; raises MalformedError if it cannot be read."""
        return self.header(name) or read_any(self.path(name))

    def tensors(self, name: str) -> Mapping[str, StoredTensor]:
        """Return the tensors of a weight file; empty if it cannot be read."""
        header = self.header(name)
        return header.tensors if header else {}

    def find(self, test: Callable[[Mapping[str, StoredTensor]], bool]) -> str | None:
        """Return the first candidate whose tensors pass a test."""
        return next((name for name in self.candidates if (tensors := self.tensors(name)) and test(tensors)), None)

    def only(self, test: Callable[[Mapping[str, StoredTensor]], bool], where: str) -> str:
        """Return the one candidate whose tensors pass a test; RefError names several, or says that none does."""
        passing = [name for name in self.candidates if test(self.tensors(name))]
        if len(passing) > 1:
            names = ", ".join(passing)
            raise RefError(f"{where} holds several adapters: {names}.", hint=f"name one, such as {passing[0]}")
        if not passing:
            raise RefError(f"{where} holds no file with the adapter's tensors.", hint="download it again")
        return passing[0]


def read_any(path: Path) -> Header:
    """Read the header of a weight file of any kind; a pickle may wrap its dict of tensors once."""
    if path.name.endswith((*PICKLES, LITGPT)):
        from .torch_pickle import read_pickle

        return read_pickle(path, WRAPPERS)
    if path.suffix == NUMPY:
        from .numpy_archive import read_npz

        return read_npz(path)
    if path.suffix == GGUF:
        from .gguf_file import read_gguf

        return read_gguf(path)
    from .checkpoint import read_weights

    return read_weights(path)


def _read(reader: Callable[[], Any]) -> Any:
    try:
        return reader()
    except DoraConvertError:
        return None
