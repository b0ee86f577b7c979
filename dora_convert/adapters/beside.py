"""Hold the weight files that lie beside an adapter's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FileBeside:
    """A weight file beside the adapter's own: its name, its fate, and its number of tensors."""

    name: str
    fate: str  # applied | ignored | model: a whole model, which is left out
    tensors: int


def doubts_of(files: Sequence[FileBeside], adapter: str) -> Iterator[str]:
    """Yield a warning for each file that is left out, and one for the models among them."""
    for file in files:
        if file.fate == "ignored":
            yield f"{file.name} was left out (--ignore-file): {file.tensors} tensors"
    if models := [file.name for file in files if file.fate == "model"]:
        yield f"not applied, a model's weights beside {adapter}: {', '.join(models)}"
