"""Choose the files of diffusers' pipelines: folders of components, each with weights of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .filenames import PICKLES, RECORD

INDEX = "model_index.json"
"""The file that names the components."""
_VARIANT = re.compile(r"([^.]+)\.\w+((?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)(?:\.index\.json)?)")


def components(names: Sequence[str]) -> list[str]:
    """Return the folders at the top of a pipeline that hold weights, by the paths of its files."""
    weights = [name for name in names if name.count("/") == 1 and name.endswith((".safetensors", *PICKLES))]
    folders = {name.partition("/")[0] for name in weights}
    return sorted(folder for folder in folders if folder != RECORD and not folder.startswith("."))


def files_inside(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of each component of a pipeline: names inside of it, by the component with a slash."""
    inside = {f"{component}/": list[str]() for component in components(names)}
    for name in names:
        folder, slash, inner = name.partition("/")
        if slash and "/" not in inner and folder + slash in inside:
            inside[folder + slash].append(inner)
    return inside


def without_variants(names: Sequence[str]) -> list[str]:
    """Return file names without those of other precisions, such as model.fp16.safetensors beside the plain one."""
    return [name for name in names if not ((match := _VARIANT.fullmatch(name)) and match[1] + match[2] in names)]
