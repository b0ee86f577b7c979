"""Decide if an existing OUT may be replaced: only by its like, and only if this tool wrote it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

from ..errors import DoraConvertError, OutputError
from ..formats.detect import MODEL_FILES, detect, model_weights
from ..storage.filenames import RECORD
from .card import NAME, is_unedited
from .receipt import read_receipt

Kind = Literal["a model", "an adapter"]


def refuse_existing(out: Path, kind: Kind, *, overwrite: bool) -> None:
    """Raise OutputError for an OUT that exists, unless `overwrite` may put an output of a kind in its place."""
    if out.is_symlink() or not out.is_dir():
        what = "a link" if out.is_symlink() else "a file" if out.is_file() else "something else"
        raise OutputError(f"OUT {out} is {what}, not a folder; it is not replaced.", hint="choose another name")
    found, is_empty = _kind_of(out), not any(out.iterdir())
    if is_empty or (found == kind and _is_ours(out, kind)):
        if not overwrite:
            raise OutputError(f"OUT {out} exists.", hint="choose another name, or --overwrite")
    elif found is None:
        raise OutputError(
            f"OUT {out} exists and was not written by dora-convert; it is not replaced.",
            hint="choose another name, or remove it yourself",
        )
    else:
        whose = "" if _is_ours(out, found) else ", and no record shows that dora-convert wrote it"
        raise OutputError(
            f"OUT {out} exists. It is {found}{whose}; it is not replaced by {kind}. Did you forget OUT?",
            hint="the last word is OUT, a folder that does not exist yet",
        )


def _kind_of(folder: Path) -> Kind | None:
    if detect(folder):
        return "an adapter"
    is_model = any((folder / name).is_file() for name in MODEL_FILES)
    return "a model" if is_model or model_weights(folder) else None


def _is_ours(folder: Path, kind: Kind) -> bool:
    """Return True if a folder holds the receipt of a merge, or an adapter with an unedited card of ours."""
    with suppress(OSError, DoraConvertError):
        if kind == "an adapter":
            return is_unedited((folder / NAME).read_bytes())
        return not (folder / RECORD).is_symlink() and read_receipt(folder / RECORD) is not None
    return False
