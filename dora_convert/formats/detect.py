"""Find an adapter's format by its file names, local or remote, and answer questions about files of adapters.

A format is a file or a folder with the names of `Format`, and one line in `FORMATS`, tried in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..adapters import NOTHING, Adapter, Waived
from ..errors import RefError, UsageError
from ..storage.filenames import MODEL, OF_TRAINING, is_beside, is_weight_file
from ..storage.refs import Source
from . import peft

if TYPE_CHECKING:
    from ..adapters.new_adapter import Writer


class Format(Protocol):
    """The names that a format module provides."""

    NAME: str
    """The format's name for `--format` and in reports."""
    LIBRARY: str
    """The library that loads the format, for model cards."""
    ANCHOR: str
    """The file that every adapter of the format has."""
    WEIGHTS: tuple[str, ...]
    """The files that may hold the tensors."""

    def recognises(self, names: Sequence[str], path: Path | None) -> bool:
        """Return True for files of this format; headers can be read if there is a local `path`."""

    def owns(self, name: str) -> bool:
        """Return True if a file is the adapter's own, by its path in the folder."""

    def read(self, source: Source, waived: Waived = NOTHING) -> Adapter:
        """Read the adapter's headers, without what is waived."""

    def read_refused(self, source: Source, waived: Waived = NOTHING) -> Adapter:
        """Read as much as can be said of an adapter that `read` refuses."""

    def writer(self) -> Writer:
        """Return the names that write the format, imported when they are needed."""


FORMATS: tuple[Format, ...] = (peft,)
ANCHORS = tuple(known.ANCHOR for known in FORMATS)


def find_format(name: str) -> Format:
    """Return a format by its name; UsageError lists the names."""
    for known in FORMATS:
        if name == known.NAME:
            return known
    raise UsageError(f"--format {name!r} is not one of {', '.join(known.NAME for known in FORMATS)}.")


def detect(where: Path | Sequence[str]) -> Format | None:
    """Return the format of a local path, or of a remote folder by its file names; None for no adapter."""
    names, path = _names(where), where if isinstance(where, Path) else None
    return next((known for known in FORMATS if known.recognises(names, path)), None)


def _names(where: Path | Sequence[str]) -> Sequence[str]:
    if not isinstance(where, Path):
        return where
    return [entry.name for entry in where.iterdir()] if where.is_dir() else [where.name]


def is_adapter_file(name: str) -> bool:
    """Return True if a file is an adapter's own, by its path in the folder."""
    return any(known.owns(name) for known in FORMATS)


def wanted_of_adapter(names: Sequence[str]) -> list[str]:
    """Return the files to download: the adapter's own, trained weights beside them, a tokenizer's; no model."""
    is_wanted = is_small_of_adapter if detect(names) else is_adapter_file
    return [name for name in names if "/" not in name and (is_wanted(name) or not is_weight_file(name))]


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
    return detect(where) is not None and not any(map(MODEL.match, model_weights(where)))


def refuse_adapter(where: Path | Sequence[str], name: str) -> None:
    """Raise RefError for an adapter that was named as a model."""
    if is_only_adapter(where):
        raise RefError(
            f"{name} is an adapter, not a model.", hint="dora-convert merge makes a model of base and adapter"
        )
