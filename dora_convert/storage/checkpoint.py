"""Open a checkpoint by its headers: the tensors of each weight file, and the files beside the weights.

This file reads no weights. The index decides which shards count; a single `model.safetensors` wins over an
index, as in transformers' loader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Fault, MalformedError, RefError, UnsupportedError
from .filenames import (
    CARD,
    GGUF,
    IN_PLACE,
    JOURNAL,
    OF_TRAINING,
    PICKLES,
    RECORD,
    FileStates,
    file_states,
    gguf_model,
    is_text,
    linked_folders,
    list_files,
    only_entry,
    sort_files,
)
from .json_files import indexed_files, read_config
from .refs import Source
from .safetensors import FLOATS, Header, StoredTensor, files_of, open_file, read_header

if TYPE_CHECKING:
    from .gguf_model import GgufModel


@dataclass(frozen=True)
class Shard:
    """One weight file: its name, header metadata, and the tensors that count, in the order of their bytes."""

    filename: str
    metadata: Mapping[str, str]
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, as far as its headers and small files tell."""

    source: Source
    shards: tuple[Shard, ...]
    index_name: str | None
    config: Mapping[str, Any] | None = None
    side_files: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors on disk, where they differ."""
    states: FileStates = field(default_factory=dict)
    """The local files that a merge reads, as they were before their headers were read."""
    gguf: GgufModel | None = None
    """The pairs of GGUF files, if the weights are in such files."""

    @property
    def root(self) -> Path:
        """The folder that holds the weight files."""
        return self.source.path.parent if self.is_file else self.source.path

    @property
    def is_file(self) -> bool:
        """True if the checkpoint is a single weight file; files beside it do not count."""
        return self.source.path.is_file()

    @property
    def is_bare(self) -> bool:
        """True for a single weight file that tells nothing of the model's config: an output has weights alone."""
        return self.is_file and not self.gguf

    @property
    def is_pipeline(self) -> bool:
        """True for a pipeline of diffusers, whose shards lie in folders."""
        return any("/" in shard.filename for shard in self.shards)

    @property
    def is_here(self) -> bool:
        """True if all weight files are on this machine."""
        return all(path.is_file() for path in files_of(self.tensors.values()))

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor on disk."""
        return self.renamed.get(name, name)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @cached_property
    def modules(self) -> Mapping[str, Sequence[str]]:
        """Every module that owns a tensor, sorted by name under the name of its parent."""
        from .module_names import modules_of

        return modules_of(self.tensors)

    @cached_property
    def module_kinds(self) -> tuple[str, ...]:
        """Every module's name with `*` for its numbers, once each."""
        from .module_names import kinds_of

        return kinds_of(self.modules)

    @cached_property
    def model_types(self) -> frozenset[str]:
        """Every `model_type` in the config, nested ones too."""
        names = (config.get("model_type") for config in self.configs)
        return frozenset(name for name in names if isinstance(name, str))

    @property
    def may_be_quantised(self) -> bool:
        """True if a tensor is not of plain floats, or a config speaks of quantisation."""
        odd = any(tensor.dtype not in FLOATS for tensor in self.tensors.values())
        return odd or any("quantization" in key or key == "compression_config" for each in self.configs for key in each)

    @property
    def configs(self) -> list[Mapping[str, Any]]:
        """The config and the configs nested in it, an outer one before its inner ones."""
        found = [self.config] if self.config is not None else []
        for config in found:
            found += [value for value in config.values() if isinstance(value, Mapping)]
        return found


def open_checkpoint(source: Source, *, unfinished: bool = False) -> Checkpoint:
    """Read the headers of a checkpoint: a folder, or a single weight file.

    A checkpoint that is being changed in place is refused unless `unfinished` is set.

    Raises RefError when there are no weights, MalformedError when files contradict each other,
    UnsupportedError for weights in a format that is not read.
    """
    root = source.path
    if root.suffix == GGUF and root.is_file():
        return _open_gguf(source, root.name)
    if root.is_file():
        states = file_states([root, root.parent / "config.json"])
        shards = assemble(root.name, {root.name: read_weights(root)}, None, [])
        return Checkpoint(source, shards, None, read_config(root.parent), states=states)
    if not unfinished and (root / IN_PLACE / JOURNAL).exists():
        raise RefError(
            f"{source.address} is being changed in place.", hint="run the same command with --in-place again"
        )
    if not (entries := [entry.name for entry in root.iterdir()]):
        raise RefError(f"{source.address} is empty.", hint="name the folder with the model's files")
    if "model_index.json" in entries:
        return _open_pipeline(source)
    name = weight_entry(entries, source.address)
    names = [name for name in list_files(root) if not name.startswith(IN_PLACE)]
    if odd := [name for name in names if not is_text(name)]:
        raise MalformedError(f"{root} holds a file whose name is not UTF-8: {odd[0]!r}.", hint="rename it")
    if name.endswith(GGUF):
        return _open_gguf(source, name, [each for each in names if not each.endswith(GGUF)])
    states = file_states(root / name for name in names)
    notes = [f"{name} is a link to a folder; it is not copied" for name in linked_folders(root)]
    table, files = None, [name]
    if name.endswith(".json"):
        table, files = indexed_files(root / name)
    shards = assemble(root.name, {file: read_weights(root / file) for file in files}, table, notes)
    used = {name, *files}
    side_files, left_behind = sort_files(name for name in names if name not in used)
    read = {*used, *side_files, CARD, *(name for name in names if name.startswith(f"{RECORD}/"))}
    return Checkpoint(
        source,
        shards,
        name if table is not None else None,
        config=read_config(root),
        side_files=side_files,
        left_behind=left_behind,
        notes=tuple(notes),
        states={path: state for path, state in states.items() if path.relative_to(root).as_posix() in read},
    )


def _open_pipeline(source: Source) -> Checkpoint:
    """Return the components of a pipeline as one checkpoint, whose tensors are named `<component>/<name>`."""
    from .pipelines import components

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
        raise RefError(f"{source.address} is a pipeline, and no component of it holds weights.")
    used = {*indexes, *(shard.filename for shard in shards)}
    sides, left = sort_files(name for name in names if name not in used)
    states = file_states(root / name for name in (*used, *sides))
    sides = tuple(sorted((*sides, *indexes)))
    return Checkpoint(
        source, tuple(shards), None, side_files=sides, left_behind=left, notes=tuple(notes), states=states
    )


def _open_gguf(source: Source, name: str, beside: Sequence[str] = ()) -> Checkpoint:
    """Open a model in GGUF files from the name of one of them; without others beside it, no config there counts."""
    from .gguf_model import read_model

    found = read_model(source, name, beside)
    shards = tuple(Shard(*shard) for shard in found.shards)
    return Checkpoint(
        source, shards, found.index_name, found.config, *sort_files(beside), states=found.states, gguf=found.model
    )


def read_weights(path: Path) -> Header:
    """Read the header of a weight file, in the format that its suffix names."""
    with open_file(path) as file:
        start = file.read(16).lower()
    if not start:
        raise MalformedError(f"{path} is empty (0 bytes).", hint="download it again")
    if start.startswith((b"<!doctype", b"<html")):
        raise MalformedError(f"{path} is an HTML page, not weights.", hint="download it again, perhaps with a token")
    if path.suffix in PICKLES:
        from .torch_pickle import read_pickle

        return Header(read_pickle(path).tensors, {"format": "pt"})
    if path.suffix != ".safetensors":
        raise UnsupportedError(
            f"{path} is not a weight file.", hint="weight files end in .safetensors, .bin, .pt or .pth"
        )
    return read_header(path)


def weight_entry(names: Sequence[str], where: str) -> str:
    """Return the file that a loader starts from: safetensors before pickles, one file before an index.

    A lone file of the kind will do if neither has its usual name.
    """
    for stem, kinds in (("model", (".safetensors",)), ("pytorch_model", PICKLES)):
        for suffix in (kinds[0], f"{kinds[0]}.index.json"):
            if f"{stem}{suffix}" in names:
                return f"{stem}{suffix}"
        if any(name.count(".") > 1 for name in names):
            from .pipelines import without_variants

            names = without_variants(names)
        indexes = sorted(name for name in names if name.endswith(f"{kinds[0]}.index.json"))
        entries = indexes or sorted(name for name in names if name.endswith(kinds) and not OF_TRAINING.match(name))
        if entries:
            return only_entry(entries, f"{stem}{kinds[0]}", where)
    if old := sorted(name for name in names if name.endswith(".ckpt")):
        raise UnsupportedError(
            f"{where} has only {', '.join(old[:3])}: .ckpt files are not read.",
            hint="save it as safetensors, such as with diffusers: from_single_file(FILE).save_pretrained(FOLDER)",
        )
    if files := gguf_model(names):
        return files[0]
    if other := sorted(name for name in names if name.endswith((".h5", ".msgpack"))):
        raise UnsupportedError(
            f"{where} has no safetensors weights, only {', '.join(other[:3])}: not read yet.",
            hint="save the model as safetensors, or name a revision that has them",
        )
    raise RefError(f"{where} holds no safetensors weights.", hint="name the folder with the model's files")


def assemble(
    where: str, headers: Mapping[str, Header], index: Mapping[str, str] | None, notes: list[str]
) -> tuple[Shard, ...]:
    """Return headers, by file name, as shards; raise MalformedError if an index contradicts them.

    A tensor that the index does not list counts if no other shard has it.
    """
    table = index or {}
    absent = [Fault(name, f"not in {file}") for name, file in table.items() if name not in headers[file].tensors]
    if absent:
        raise MalformedError(f"The index of {where} is wrong about {len(absent)} tensors.", faults=absent)
    if len(table) == sum(len(header.tensors) for header in headers.values()):  # each is where the index says
        return tuple(Shard(file, header.metadata, tuple(header.tensors.values())) for file, header in headers.items())
    owner = dict(table)
    for filename, header in headers.items():
        kept = [name for name in header.tensors if owner.setdefault(name, filename) == filename and name not in table]
        if index is not None:
            notes += [f"{name} is in {filename} but not in the index; it is kept" for name in kept]
        if twice := [name for name in header.tensors if owner[name] != filename]:
            notes.append(f"not read from {filename}: {len(twice)} tensors that the index has elsewhere, as {twice[0]}")
    return tuple(
        Shard(file, header.metadata, tuple(each for each in header.tensors.values() if owner[each.name] == file))
        for file, header in headers.items()
    )
