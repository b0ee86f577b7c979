"""A base checkpoint as headers: which file holds which tensor, and what lies beside the weights.

Nothing here reads a weight. The index decides which shards count; a single `model.safetensors` wins over an index, as
in transformers' loader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import Fault, MalformedError, RefError, UnsupportedError, shown
from .json_files import read_config, read_json
from .refs import Source
from .safetensors import Header, StoredTensor, read_header
from .torch_pickle import read_pickle

INDEX_SUFFIX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")
OF_TRAINING = re.compile(r"adapter_|training_args|optimizer|scheduler|rng_state|scaler")
"""How the names of files begin that lie beside weights and are none."""
ADAPTER_FILES = "adapter_"
"""The beginning of names of an adapter's files, which may lie beside a model."""
RECORD = "dora_convert"
"""The sub-folder of an output that holds the receipt and the undo record."""
RECEIPT = "receipt.json"
"""What a merge leaves there so that it can be audited."""

IN_PLACE = ".dora-convert-in-place"
"""The sub-folder of a checkpoint that is being changed where it is."""

WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data",
    ".ot", ".tflite", ".mlmodel", ".npz", ".nemo", ".pdparams", ".index.json",
)  # fmt: skip
"""Files that hold weights, or say where they are: stale beside merged ones, so never copied."""

WEIGHT_FOLDERS = ("original", "onnx", "openvino", "coreml", "metal", "gguf")
NOT_COPIED = ("README.md", ".lock")


@dataclass(frozen=True)
class Shard:
    """One weight file: its name, header metadata, and the tensors that count, in the order of their bytes."""

    filename: str
    metadata: Mapping[str, str]
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A base checkpoint, as far as its headers and small files tell."""

    source: Source
    shards: tuple[Shard, ...]
    index_name: str | None
    config: Mapping[str, Any] | None = None
    side_files: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    """What tensors are called on disk, where that is something else."""

    @property
    def root(self) -> Path:
        """The folder that its files lie in."""
        return self.source.path.parent if self.is_file else self.source.path

    @property
    def is_file(self) -> bool:
        """Whether it is a single weight file, and what lies beside it is none of our business."""
        return self.source.path.is_file()

    @property
    def is_here(self) -> bool:
        """True if all weight files are on this machine."""
        return all(path.is_file() for path in {tensor.path for tensor in self.tensors.values()})

    def origin(self, name: str) -> str:
        """What a tensor is called on disk."""
        return self.renamed.get(name, name)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @cached_property
    def modules(self) -> Mapping[str, Sequence[str]]:
        """Every module that owns a tensor, sorted by name under the name of its parent."""
        found: dict[str, set[str]] = {}
        for name in self.tensors:
            module = name.rpartition(".")[0]
            found.setdefault(module.rpartition(".")[0], set()).add(module)
        return {parent: sorted(modules) for parent, modules in found.items()}

    @cached_property
    def module_kinds(self) -> tuple[str, ...]:
        """Every module's name with its numbers taken out, once each."""
        found = {re.sub(r"\d+", "*", module) for modules in self.modules.values() for module in modules}
        return tuple(sorted(found))

    @cached_property
    def model_types(self) -> frozenset[str]:
        """Every `model_type` in the config, nested ones too."""
        found = (config.get("model_type") for config in self.configs)
        return frozenset(name for name in found if isinstance(name, str))

    @property
    def configs(self) -> Iterator[Mapping[str, Any]]:
        """The config and those nested in it, the outermost first."""
        return _nested(self.config)


def _nested(config: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(config, Mapping):
        yield config
        for value in config.values():
            yield from _nested(value)


def open_checkpoint(source: Source, *, unfinished: bool = False) -> Checkpoint:
    """Read the headers of a checkpoint: a folder, or a single weight file.

    One that is being changed in place is refused unless `unfinished` is set.

    Raises RefError when there are no weights, MalformedError when files contradict each other, UnsupportedError for
    weights in a format that is not read.
    """
    root = source.path
    if root.is_file():
        return Checkpoint(source, (_shard(root),), None, read_config(root.parent))
    if not unfinished and (root / IN_PLACE / "journal.jsonl").exists():
        raise RefError(
            f"{source.name} is being changed in place, and that was not finished.",
            hint="run the same command with --in-place again",
        )
    name = weight_entry([entry.name for entry in root.iterdir()], source.name)
    notes: list[str] = []
    sharded = name.endswith(".json")
    shards = _sharded(root, weight_map(root / name), notes) if sharded else (_shard(root / name),)
    side_files, left_behind = _survey(root, {name, *(shard.filename for shard in shards)})
    return Checkpoint(
        source,
        shards,
        name if sharded else None,
        read_config(root),
        side_files,
        left_behind,
        tuple(notes),
    )


def _shard(path: Path) -> Shard:
    header = read_weights(path)
    return Shard(path.name, header.metadata, tuple(header.tensors.values()))


def read_weights(path: Path) -> Header:
    """The header of a weight file, by its name's ending."""
    if path.suffix in PICKLES:
        return Header(read_pickle(path).tensors, {"format": "pt"})
    if path.suffix != ".safetensors":
        raise UnsupportedError(
            f"{path} is no weight file that is read.", hint="those end in .safetensors, .bin, .pt or .pth"
        )
    return read_header(path)


def weight_entry(names: Sequence[str], where: str) -> str:
    """The file that a loader would start from: safetensors before pickles, one file before an index.

    Where neither has its usual name, a lone file of the kind will do.
    """
    for stem, kinds in (("model", (".safetensors",)), ("pytorch_model", PICKLES)):
        for suffix in (kinds[0], f"{kinds[0]}.index.json"):
            if f"{stem}{suffix}" in names:
                return f"{stem}{suffix}"
        indexes = sorted(name for name in names if name.endswith(f"{kinds[0]}.index.json"))
        found = indexes or sorted(
            name for name in names if name.endswith(kinds) and not OF_TRAINING.match(name)
        )
        if len(found) == 1:
            return found[0]
        if found:
            raise RefError(
                f"{where} holds several models and no {stem}{kinds[0]}: {', '.join(found)}.",
                hint="name one file",
            )
    if other := sorted(name for name in names if name.endswith((".gguf", ".h5", ".msgpack"))):
        raise UnsupportedError(
            f"{where} has no safetensors weights, only {', '.join(other[:3])}: not read yet.",
            hint="save the model as safetensors, or name a revision that has them",
        )
    raise RefError(f"{where} holds no safetensors weights.")


def weight_map(path: Path) -> dict[str, str]:
    """The index: tensor name to the plain name of a file in the same folder."""
    index = read_json(path)
    table = index.get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise MalformedError(f"{path}: weight_map must map tensor names to file names.")
    for filename in sorted(set(table.values())):
        if not is_plain(filename):
            raise MalformedError(f"{path}: {shown(filename)} is not a plain file name.")
    return table


def is_plain(filename: object) -> bool:
    """Whether a value is the name of a file in the same folder, on any system."""
    if not isinstance(filename, str):
        return False
    outside = filename in ("", ".", "..") or PurePosixPath(filename).name != filename
    odd = "\\" in filename or "\0" in filename or not is_text(filename)
    return not (outside or odd) and len(filename.encode()) <= 255


def is_inside(name: object) -> bool:
    """Whether a value is a path that leads from a folder to something inside it, on any system."""
    return isinstance(name, str) and len(name) < 1000 and all(map(is_plain, name.split("/")))


def _sharded(root: Path, table: Mapping[str, str], notes: list[str]) -> tuple[Shard, ...]:
    """The shards an index names; tensors it does not list count only if no other shard has them."""
    filenames = sorted(set(table.values()))
    if missing := [name for name in filenames if not (root / name).exists()]:
        raise RefError(
            f"The index of {root.name} names {len(missing)} files that are not there.",
            faults=[Fault(name, "missing") for name in missing],
        )
    return assemble(root.name, {name: read_weights(root / name) for name in filenames}, table, notes)


def assemble(
    where: str, headers: Mapping[str, Header], index: Mapping[str, str] | None, notes: list[str]
) -> tuple[Shard, ...]:
    """Headers by file name as shards; MalformedError where the index, if there is one, is wrong about them."""
    table = index or {}
    absent = [
        Fault(name, f"not in {file}") for name, file in table.items() if name not in headers[file].tensors
    ]
    if absent:
        raise MalformedError(f"The index of {where} is wrong about {len(absent)} tensors.", faults=absent)
    owner = dict(table)
    for filename, header in headers.items():
        unlisted = [name for name in header.tensors if owner.setdefault(name, filename) == filename]
        notes += [
            f"{name} is in {filename} but not in the index; it is kept"
            for name in unlisted
            if index is not None and name not in table
        ]
    return tuple(_owned(filename, header, owner) for filename, header in headers.items())


def _owned(filename: str, header: Header, owner: Mapping[str, str]) -> Shard:
    tensors = tuple(tensor for tensor in header.tensors.values() if owner[tensor.name] == filename)
    return Shard(filename, header.metadata, tensors)


def is_weight_file(name: str) -> bool:
    """Whether a file, by its path inside the folder, holds weights or an index of them."""
    path = PurePosixPath(name)
    return path.name.endswith(WEIGHT_SUFFIXES) or path.parts[0] in WEIGHT_FOLDERS


def is_side_file(name: str) -> bool:
    """Whether a file, by its path inside the folder, belongs in a copy of the model beside its weights."""
    parts = PurePosixPath(name).parts
    hidden = any(part in (".cache", "__pycache__") or part.startswith(".git") for part in parts)
    adapter = len(parts) == 1 and name.startswith(ADAPTER_FILES)
    return not (hidden or parts[0] == RECORD or adapter or name in NOT_COPIED or is_weight_file(name))


def list_files(root: Path) -> list[str]:
    """Every file below a folder as a posix path, sorted; symbolic links are followed."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def is_text(name: str) -> bool:
    """Whether a name is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _survey(root: Path, used: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What lies beside the weights: files to copy, and other weights to leave behind."""
    names = [name for name in list_files(root) if name not in used and not name.startswith(IN_PLACE)]
    if odd := [name for name in names if not is_text(name)]:
        raise MalformedError(f"{root} holds a file whose name is not UTF-8: {odd[0]!r}.", hint="rename it")
    visible = [name for name in names if not name.startswith((".", RECORD + "/"))]
    return tuple(filter(is_side_file, names)), tuple(filter(is_weight_file, visible))
