"""Find an adapter's format, local or remote, folder or file, and answer questions about files of adapters.

A format is a file or a folder with the names of `Format`, and one line in `FORMATS`. The formats are asked in this
order, and the first that recognises the files counts. A format is imported when it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from ..adapters import NOTHING, Adapter, Waived
from ..errors import DoraConvertError, RefError, UnsupportedError, UsageError
from ..settings import AdapterFacts
from ..storage.filenames import MODEL, OF_TRAINING, is_beside, is_weight_file
from ..storage.json_files import read_json
from ..storage.refs import Source
from . import peft

if TYPE_CHECKING:
    from ..adapters.new_adapter import Writer
    from ..storage.file_view import FileView
    from ..storage.safetensors import StoredTensor


class Format(Protocol):
    """The names that a format module provides."""

    NAME: str
    """The format's name for `--format` and in reports."""
    LIBRARY: str
    """The library that loads the format, for model cards."""
    TAKES: tuple[str, ...]
    """The facts that callers may have to give: alpha, scaling, axis, enable_lora."""

    def recognises(self, view: FileView) -> bool:
        """Return True for files of this format, by their names, their JSON and their headers."""

    def read(self, source: Source, waived: Waived = NOTHING) -> Adapter:
        """Read the adapter's headers, with the caller's words."""


class WritableFormat(Format, Protocol):
    """A format that adapters are written in."""

    def writer(self) -> Writer:
        """Return the names that write the format, imported when they are needed."""


class Line(NamedTuple):
    """One format: its module, and the names of its own files; other names only its tensors can tell."""

    module: str
    files: tuple[str, ...] = ()


FORMATS = (
    Line("peft", ("adapter_*",)),
    Line("torchtune", ("adapter_model.pt", "adapter_[0-9]*.pt")),
    Line("nvlabs", ("non_lora_trainables.bin",)),
    Line("hf_adapters", ("pytorch_adapter.bin", "adapter.safetensors", "head_config.json", "pytorch_model_head.bin")),
    Line("mlx", ("adapters.safetensors", "adapters.npz", "[0-9]*_adapters.safetensors", "[0-9]*_adapters.npz")),
    Line("litgpt", ("lit_model.pth.lora",)),
    Line("diffusers", ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")),
    Line("kohya"),
    Line("fsdp_qlora"),
    Line("whole_models"),
    Line("loralib"),
    Line("gguf"),
    Line("refused"),
)
CONFIG = "adapter_config.json"
MODEL_FILES = ("config.json", "model_index.json")
ANCHORS = (
    CONFIG, "adapters.safetensors", "lit_model.pth.lora", "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin", "adapters.npz",
)  # fmt: skip
"""Files that show by their names that a folder holds an adapter."""


@cache
def load(module: str) -> Format:
    """Return a format by the name of its module."""
    return cast("Format", import_module(f".{module}", __package__))


def find_format(name: str) -> Format:
    """Return a format by the name that its adapters have."""
    return next(load(line.module) for line in FORMATS if name == load(line.module).NAME)


def find_writable(name: str) -> WritableFormat:
    """Return a format that is written, by its name; UsageError lists the names."""
    if name not in writable():
        raise UsageError(f"{name!r} is not a format that is written.", hint=f"one of {', '.join(writable())}")
    return cast("WritableFormat", find_format(name))


def writable() -> list[str]:
    """Return the names of the formats that are written."""
    return [load(line.module).NAME for line in FORMATS if hasattr(load(line.module), "writer")]


def detect(where: Path | Sequence[str]) -> Format | None:
    """Return the format of a local path, or of a remote folder by its file names; None for no adapter."""
    names = _names(where)
    if CONFIG in names and _is_plain_peft(where):
        return cast("Format", peft)
    local = isinstance(where, Path)
    is_named = any(name in ANCHORS or _owner(name) for name in names)
    if (not local and not is_named) or (any(name in names for name in MODEL_FILES) and not is_named):
        return None
    from ..storage.file_view import FileView

    view = FileView.of(where)
    found = next((known for line in FORMATS if (known := load(line.module)).recognises(view)), None)
    return found or (cast("Format", peft) if CONFIG in names else None)


def _is_plain_peft(where: Path | Sequence[str]) -> bool:
    """Return True for a folder of PEFT's, without a look at other formats."""
    if not isinstance(where, Path) or not where.is_dir():
        return False
    try:
        return peft.is_config(read_json(where / CONFIG))
    except DoraConvertError:
        return True  # its reader says what is wrong


def _names(where: Path | Sequence[str]) -> Sequence[str]:
    if not isinstance(where, Path):
        return where
    return [entry.name for entry in where.iterdir()] if where.is_dir() else [where.name]


def _owner(name: str) -> Line | None:
    """Return the format that has files of a name, by their paths in the folder."""
    names = (line for line in FORMATS if any(fnmatchcase(name, pattern) for pattern in line.files))
    return None if "/" in name else next(names, None)


def view_of(source: Source) -> FileView:
    """Return the files of a local folder, or a single file."""
    from ..storage.file_view import FileView

    return FileView.of(source.path)


def read_refused(known: Format, source: Source, waived: Waived) -> Adapter:
    """Read as much as can be said of an adapter that `known` refuses."""
    if own := getattr(known, "read_refused", None):
        return cast("Adapter", own(source, waived))
    from ..adapters.parts import Findings

    view, facts = view_of(source), waived.facts
    guess = facts if facts.given else AdapterFacts(scaling=float("nan"))
    try:
        return known.read(source, replace(waived, facts=guess))
    except UnsupportedError:
        files = [name for name in view.weights if view.tensors(name)]
        return Findings().adapter(view, files, source, format=known.NAME, kind="unknown")


def is_adapter_file(name: str) -> bool:
    """Return True if a file is an adapter's own, by its path in the folder."""
    return _owner(name) is not None


def wanted_of_adapter(names: Sequence[str]) -> list[str]:
    """Return the files to download: the adapter's own, trained weights beside them, a tokenizer's; no model.

    A lone weight file of another name counts as the adapter's.
    """
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if is_weight_file(name)]
    if detect(names) or len(weights) > 1 or any(name in top for name in MODEL_FILES):
        is_wanted = is_small_of_adapter if detect(names) else is_adapter_file
        return [name for name in top if is_wanted(name) or name not in weights]
    return top


def is_small_of_adapter(name: str) -> bool:
    """Return True for an adapter's own files, and for weights beside them that are no model by their names."""
    return is_adapter_file(name) or (is_beside(name) and not MODEL.match(name))


def adapters_inside(where: Path | Sequence[str]) -> list[str]:
    """Return the sub-folders that hold adapters; of a local folder, two levels deep."""
    if isinstance(where, Path):
        globs = (sorted(where.glob(f"{depth}/{anchor}")) for depth in ("*", "*/*") for anchor in ANCHORS)
        return [path.parent.relative_to(where).as_posix() for paths in globs for path in paths]
    return sorted(name.rpartition("/")[0] for name in where if "/" in name and Path(name).name in ANCHORS)


def model_weights(where: Path | Sequence[str]) -> list[str]:
    """Return the files at the top of a folder that hold a model's weights, sorted."""
    weights = (name for name in _names(where) if "/" not in name and is_weight_file(name))
    return sorted(name for name in weights if not (OF_TRAINING.match(name) or is_adapter_file(name)))


def is_only_adapter(where: Path | Sequence[str]) -> bool:
    """Return True for an adapter without a model's weights beside it."""
    if detect(where) is None:
        return False
    return not any(name in ANCHORS for name in _names(where)) or not any(map(MODEL.match, model_weights(where)))


def refuse_adapter(where: Path | Sequence[str], name: str) -> None:
    """Raise RefError for an adapter that was named as a model."""
    if is_only_adapter(where):
        known = detect(where)
        kind = f" ({known.NAME})" if known and known.NAME != peft.NAME else ""
        raise RefError(
            f"{name} is an adapter{kind}, not a model.", hint="dora-convert merge makes a model of base and adapter"
        )


def by_tensors(tensors: Mapping[str, StoredTensor]) -> Format | None:
    """Return the format of one weight file without a config, by the names and shapes of its tensors."""
    from ..storage.file_view import FileView

    view = FileView.of_tensors(tensors)
    return next((known for line in FORMATS if (known := load(line.module)).recognises(view)), None)


def refuse_tensors(tensors: Mapping[str, StoredTensor], name: str) -> None:
    """Raise RefError if the tensors of a weight file on the Hub, named as a model, are those of an adapter."""
    if known := by_tensors(tensors):
        raise RefError(f"{name} is an adapter ({known.NAME}), not a model.")
