"""Open diffusers' pipelines: a folder of components, each with weights of its own, as one checkpoint.

`model_index.json` names the components: unet or transformer, text_encoder, vae, …. A tensor's name is
`<component>/<name in the file>`, and a shard's is its path in the pipeline's folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import RefError, UnsupportedError
from .checkpoint import Checkpoint, Shard, assemble, read_weights, shard_files, sort_files, weight_entry, weight_map
from .filenames import PICKLES, file_states, is_weight_file, list_files
from .refs import Source

INDEX = "model_index.json"
_VARIANT = re.compile(
    r"(?P<stem>[^.]+)\.(?P<variant>\w+)(?P<rest>(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?)"
)


def open_pipeline(source: Source) -> Checkpoint:
    """Read the headers of all components; raises RefError if none has weights."""
    root = source.path
    names = list_files(root)
    states = file_states(root / name for name in names)
    shards: list[Shard] = []
    notes: list[str] = []
    used: set[str] = set()
    for component in components(names):
        own = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
        opened, index = _open_component(root / component, component, without_variants(own), notes)
        shards += opened
        used |= {shard.filename for shard in opened} | {f"{component}/{name}" for name in index}
    if not shards:
        raise RefError(f"{source.name} has {INDEX}, and no component of it holds weights.")
    side_files, left_behind = sort_files(name for name in names if name not in used)
    indexes = [name for name in used if name.endswith(".index.json")]
    return Checkpoint(
        source,
        tuple(shards),
        None,
        side_files=tuple(sorted([*side_files, *indexes])),
        left_behind=left_behind,
        notes=tuple(notes),
        states={path: state for path, state in states.items() if path.relative_to(root).as_posix() not in left_behind},
    )


def components(names: Sequence[str]) -> list[str]:
    """Return the folders at the top of a pipeline that hold weights."""
    weights = [name for name in names if name.count("/") == 1 and is_weight_file(name)]
    return sorted({name.partition("/")[0] for name in weights if name.endswith((".safetensors", *PICKLES))})


def without_variants(names: Sequence[str]) -> list[str]:
    """Return file names without those of other precisions, such as model.fp16.safetensors beside the plain one."""
    kept = []
    for name in names:
        match = _VARIANT.fullmatch(name)
        plain = match and match["stem"] + match["rest"]
        if not plain or (plain not in names and not any(other.startswith(f"{match['stem']}-") for other in names)):
            kept.append(name)
    return kept


def _open_component(
    folder: Path, component: str, names: Sequence[str], notes: list[str]
) -> tuple[tuple[Shard, ...], list[str]]:
    """Return a component's shards under names with the component, and the name of its index in a list."""
    where = f"{folder.parent.name}/{component}"
    entry = weight_entry([name for name in names if "/" not in name], where)
    table = weight_map(folder / entry) if entry.endswith(".json") else None
    if table and entry.removesuffix(".index.json").endswith(PICKLES):
        raise UnsupportedError(f"{where} is split into several torch pickles.", hint="save it as safetensors")
    files = [entry] if table is None else shard_files(where, table, lambda name: (folder / name).exists())
    shards = assemble(where, {file: read_weights(folder / file) for file in files}, table, notes)
    return tuple(_within(shard, component) for shard in shards), [entry] if table else []


def _within(shard: Shard, component: str) -> Shard:
    """Return a shard whose name and whose tensors' names begin with the component."""
    tensors = tuple(replace(tensor, name=f"{component}/{tensor.name}") for tensor in shard.tensors)
    return Shard(f"{component}/{shard.filename}", shard.metadata, tensors)
