"""Find the checkpoints and adapters that are compared with the base, in the order of training."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RefError
from ..formats.detect import detect, is_adapter_file, model_weights
from ..storage.filenames import OF_TRAINING, is_weight_file
from ..storage.refs import parse_ref

_STEP = re.compile(r"checkpoint-(\d{1,18})")


@dataclass(frozen=True)
class TunedRef:
    """A REF of the series, and its number."""

    ref: str
    step: int


def expand(refs: Sequence[str]) -> list[TunedRef]:
    """Return all REFs, a Trainer's folder by the folders checkpoint-N inside, sorted by step.

    A Trainer's folder that holds a model or an adapter itself is the last step, unless the files are those of
    the last checkpoint-N. REFs that are all folders checkpoint-N of one parent are sorted by step, too.

    Raises RefError for a folder that holds nothing to compare.
    """
    series: list[TunedRef] = []
    for ref in refs:
        path = parse_ref(ref, "TUNED")
        steps = _steps(path) if isinstance(path, Path) and path.is_dir() else []
        if steps:
            series += steps
        elif isinstance(path, Path) and (number := _STEP.fullmatch(path.name)):
            series.append(TunedRef(ref, int(number[1])))
        else:
            series.append(TunedRef(ref, len(series) + 1))
    parents = {Path(each.ref).parent for each in series}
    if len(parents) == 1 and all(_STEP.fullmatch(Path(each.ref).name) for each in series):
        series.sort(key=lambda each: each.step)
    return series


def _steps(folder: Path) -> list[TunedRef]:
    """Return the steps inside a Trainer's folder; empty for any other folder."""
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    filled = sorted((number, path) for number, path in numbered if path.is_dir() and _holds_weights(path))
    if numbered and not filled and not _holds_weights(folder):
        raise RefError(f"The folders checkpoint-N in {folder} hold neither a model nor an adapter.")
    steps = [TunedRef(str(path), number) for number, path in filled]
    if steps and _holds_weights(folder) and not _same_weights(folder, filled[-1][1]):
        steps.append(TunedRef(str(folder), steps[-1].step + 1))
    return steps


def _holds_weights(folder: Path) -> bool:
    """Return True for a folder with a model's or an adapter's files."""
    return detect(folder) is not None or bool(model_weights(folder))


def _same_weights(one: Path, other: Path) -> bool:
    """Return True if two folders have the same weight files."""
    files = (path.name for path in one.iterdir() if is_weight_file(path.name))
    names = {name for name in files if is_adapter_file(name) or not OF_TRAINING.match(name)}
    if not names or any(not (other / name).is_file() for name in names):
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)
