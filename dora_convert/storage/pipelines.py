"""Open diffusers' pipelines, and choose their files: folders of components, each with weights of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ..errors import RefError
from .checkpoint import Checkpoint, Shard, open_checkpoint
from .filenames import PICKLES, RECORD, file_states, list_files, sort_files
from .refs import Source

INDEX = "model_index.json"
"""The file that names the components."""
_VARIANT = re.compile(r"([^.]+)\.\w+((?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)(?:\.index\.json)?)")


def components(names: Sequence[str]) -> list[str]:
    """Return the folders at the top of a pipeline that hold weights, by the paths of its files."""
    weights = [name for name in names if name.count("/") == 1 and name.endswith((".safetensors", *PICKLES))]
    folders = {name.partition("/")[0] for name in weights}
    return sorted(folder for folder in folders if folder != RECORD and not folder.startswith("."))


def without_variants(names: Sequence[str]) -> list[str]:
    """Return file names without those of other precisions, such as model.fp16.safetensors beside the plain one."""
    return [name for name in names if not ((match := _VARIANT.fullmatch(name)) and match[1] + match[2] in names)]


def open_pipeline(source: Source) -> Checkpoint:
    """Return the components of a pipeline as one checkpoint, whose tensors are named `<component>/<name>`."""
    root, names = source.path, list_files(source.path)
    shards, indexes, notes = list[Shard](), list[str](), list[str]()
    for component in components(names):
        part = open_checkpoint(Source(root / component, f"{source.name}/{component}"))
        for shard in part.shards:
            tensors = tuple(replace(tensor, name=f"{component}/{tensor.name}") for tensor in shard.tensors)
            shards.append(Shard(f"{component}/{shard.filename}", shard.metadata, tensors))
        indexes += [f"{component}/{part.index_name}"] if part.index_name else []
        notes += part.notes
    if not shards:
        raise RefError(f"{source.name} is a pipeline, and no component of it holds weights.")
    used = {*indexes, *(shard.filename for shard in shards)}
    sides, left = sort_files(name for name in names if name not in used)
    states = file_states(root / name for name in (*used, *sides))
    sides = tuple(sorted((*sides, *indexes)))
    return Checkpoint(
        source, tuple(shards), None, side_files=sides, left_behind=left, notes=tuple(notes), states=states
    )
